"""``kv_append`` in Triton, and the same with RoPE: keys and values of new tokens into the blocks of their
sequences (memlm/kv_formats.py).

A program has the new tokens in 16 places of one sequence that begin at a multiple of 16, of one key-value
head: of its keys, its values, or of one query head.  Codes of different tokens share bytes, but only of
those 16, so that no other program writes to its bytes.

Arithmetic: f32, each operation rounded in the order of memlm/kv_formats.py, so that the bytes are those of
the CPU, but for which NaN stands for a group that is not finite.  Keys and queries after RoPE are rounded to
their dtype, as if another operation had stored them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._kv import (
    TILE, VIEWS, butterfly, check_aligned, first_item, items, layout_of, rows_of, sequence_of,
)  # fmt: skip
from memlm.kernels.quantize_rows import ROUNDER
from memlm.kv_formats import KvFormat
from memlm.ops.kv_append import _check, check_heads

MORE = tl.constexpr(2)  # a sequence may begin and end inside a tile of places


@triton.jit
def _turned(x, channel, inside, cos, sin, angle, HALF: tl.constexpr):
    """Channels of rows x, turned to their positions (RoPE, arXiv:2104.09864, halves as pairs)."""
    low = channel < HALF
    number = tl.load(x + channel, inside, 0.0).to(tl.float32)
    other = tl.load(x + tl.where(low, channel + HALF, channel - HALF), inside, 0.0).to(tl.float32)
    at = angle + tl.where(low, channel, channel - HALF)
    product = other * tl.load(sin + at, inside, 0.0)
    turned = tl.fma(number, tl.load(cos + at, inside, 0.0), tl.where(low, -product, product))
    return turned.to(x.dtype.element_ty)


@triton.jit
def _hadamard(x, PIECE: tl.constexpr, ROOT: tl.constexpr):
    """x [rows, channels] f32, both powers of 2, after the orthonormal Walsh-Hadamard transform of each
    PIECE channels, rounded in the order of memlm/kv_formats.py."""
    ROWS: tl.constexpr = x.shape[0]
    CHANNELS: tl.constexpr = x.shape[1]
    sixteens = tl.reshape(x, [ROWS, CHANNELS // 16, 16])
    at = tl.arange(0, 16)[None, None, :]
    sums = tl.zeros([ROWS, CHANNELS // 16, 16], tl.float32)
    for j in tl.static_range(16):
        number = tl.sum(tl.where(at == j, sixteens, 0.0), 2, keep_dims=True)
        both = at & j
        both ^= both >> 2
        sums += tl.where(((both ^ both >> 1) & 1) == 1, -number, number)
    x = tl.reshape(sums, [ROWS, CHANNELS])
    for i in tl.static_range(4, 9):
        if 1 << i < PIECE:
            x = butterfly(x, 1 << i)
    return x * ROOT


@triton.jit
def _quantized(numbers, BITS: tl.constexpr, F: tl.constexpr):
    """numbers [tokens, channels] -> codes, and scales [tokens, groups] in f16."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    LEAST: tl.constexpr = -127 if BITS == 8 else -HALF
    ZERO: tl.constexpr = 0 if BITS == 8 else HALF
    TOKENS: tl.constexpr = numbers.shape[0]
    CHANNELS: tl.constexpr = numbers.shape[1]
    groups = tl.reshape(numbers, [TOKENS, CHANNELS // F.group, F.group])
    magnitudes = groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN is above all
    first = tl.argmax(magnitudes, 2, tie_break_left=True)
    at = tl.arange(0, F.group)[None, None, :]
    largest = tl.sum(tl.where(at == first[:, :, None], groups, 0.0), 2)
    scales = tl.div_rn(largest, tl.full(largest.shape, LEAST, tl.float32)).to(tl.float16)
    steps = scales.to(tl.float32)
    inverse = tl.where(steps != 0, tl.div_rn(tl.full(steps.shape, 1.0, tl.float32), steps), 0.0)
    scaled = groups * inverse[:, :, None]
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, LEAST), HALF - 1)
    codes = (scaled + ROUNDER - ROUNDER).to(tl.int32) + ZERO
    return tl.reshape(codes, [TOKENS, CHANNELS]), scales


@triton.jit
def _store_numbers(block, numbers, place, new, F: tl.constexpr, VALUES: tl.constexpr):
    """Numbers to a block of floats, of the tokens that are new."""
    slot = tl.arange(0, TILE)[:, None]
    channel = tl.arange(0, numbers.shape[1])[None, :]
    if VALUES:
        at = F.values + (channel // TILE * F.tokens + place + slot) * TILE + channel % TILE
    else:
        at = place * F.channels + channel * TILE + slot
    inside = channel < (F.width if VALUES else F.channels)
    tl.store(block + at, numbers.to(block.dtype.element_ty), inside & new[:, None])


@triton.jit
def _put(at, bits, mask, inside):
    """Bytes with other bits where the mask has ones."""
    inside = inside & (mask != 0)
    old = tl.load(at, inside, 0).to(tl.int32)
    tl.store(at, ((old & ~mask) | bits).to(tl.uint8), inside)


@triton.jit
def _store_codes(block, codes, place, new, F: tl.constexpr, VALUES: tl.constexpr, BITS: tl.constexpr):
    """Codes [16, channels] to a block, of the tokens that are new."""
    N: tl.constexpr = codes.shape[1]
    codes = tl.where(new[:, None], codes, 0)
    ones = tl.where(new[:, None], tl.full([TILE, N], (1 << BITS) - 1, tl.int32), 0)
    slot = tl.arange(0, TILE)[:, None]
    channel = tl.arange(0, N)[None, :]
    if BITS == 8:
        if VALUES:
            token = place + slot
            row = channel // TILE * F.tokens * TILE + channel % TILE * 4
            at = F.values + row + token // 4 * (4 * TILE) + token % 4
        else:
            at = place * F.width + (channel // 4 * TILE + slot) * 4 + channel % 4
        tl.store(block + at, codes.to(tl.uint8), new[:, None] & (channel < F.width))
    elif VALUES:
        # A byte has a token in its low nibble, the fourth after it in its high one.
        shift = 4 * tl.arange(0, 2)[None, :, None, None]
        bits = tl.sum(tl.reshape(codes, [2, 2, 4, N]) << shift, 1)
        mask = tl.sum(tl.reshape(ones, [2, 2, 4, N]) << shift, 1)
        eight = place // 8 + tl.arange(0, 2)[:, None, None]
        lane, channel = tl.arange(0, 4)[None, :, None], tl.arange(0, N)[None, None, :]
        at = channel // TILE * (F.tokens * TILE // 2) + (eight * TILE + channel % TILE) * 4 + lane
        _put(block + F.values + at, bits, mask, channel < F.width)
    else:
        # For 32 channels 256 bytes of nibbles, then 64 of fifth bits, of two tokens and 4 channels each.
        tile = block + place // TILE * (F.width * TILE * 5 // 8)
        shift = 4 * tl.arange(0, 2)[None, None, :, None]
        nibbles = tl.sum(tl.reshape(codes & 15, [TILE, N // 8, 2, 4]) << shift, 2)
        eight, lane = tl.arange(0, N // 8)[None, :, None], tl.arange(0, 4)[None, None, :]
        at = eight // 4 * 320 + (eight % 4 * TILE + slot[:, :, None]) * 4 + lane
        tl.store(tile + at, nibbles.to(tl.uint8), new[:, None, None] & (eight * 8 < F.width))
        shift = 4 * tl.arange(0, 2)[None, :, None, None] + tl.arange(0, 4)[None, None, None, :]
        bits = tl.sum(tl.sum(tl.reshape(codes >> 4, [8, 2, N // 4, 4]) << shift, 3), 1)
        mask = tl.sum(tl.sum(tl.reshape(ones >> 4, [8, 2, N // 4, 4]) << shift, 3), 1)
        four = tl.arange(0, N // 4)[None, :]
        at = four // 8 * 320 + 256 + four % 8 * 8 + tl.arange(0, 8)[:, None]
        _put(tile + at, bits, mask, four * 4 < F.width)


@triton.jit
def _store(
    numbers, pool, scales, tails, block, tail, place, new, newest,
    F: tl.constexpr, TAIL: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """numbers [16, channels], f32, to a block as its format has them, and to a tail."""
    if not F.coded:
        _store_numbers(pool + block * F.block, numbers, place, new, F, VALUES)
    else:
        BITS: tl.constexpr = F.value_bits if VALUES else F.key_bits
        numbers = _hadamard(numbers, F.piece, F.root)
        codes, steps = _quantized(numbers, BITS, F)
        _store_codes(pool + block * F.block, codes, place, new, F, VALUES, BITS)
        slot, group = tl.arange(0, TILE)[:, None], tl.arange(0, steps.shape[1])[None, :]
        if VALUES:
            at = F.value_scales + group * F.tokens + place + slot
        else:
            at = F.key_scales + (place // TILE * F.groups + group) * TILE + slot
        tl.store(scales + block * (F.block // 2) + at, steps, new[:, None] & (group < F.groups))
        if TAIL is not None:
            _store_numbers(tails + tail * TAIL.block, numbers, place, newest, TAIL, VALUES)


@triton.jit
def kv_append_kernel(
    pool, scales, tails, k, v, q, turned, cos, sin, positions, rows, lengths, tables, tail_of,
    sequences, blocks, tail_count, table_stride, k_stride, v_stride, q_stride, turned_stride, angle_stride,
    F: tl.constexpr, TAIL: tl.constexpr, CHANNELS: tl.constexpr, ROPE: tl.constexpr,
    POSITIONS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    item, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = sequence_of(rows, sequences, item, 1, TILE, MORE)
    first_row, length = tl.load(rows + sequence), tl.load(lengths + sequence)
    before = length - (tl.load(rows + sequence + 1) - first_row)
    start = (before // TILE + item - first_item(first_row, sequence, 1, TILE, MORE)) * TILE
    if (start >= length) | (before == length):
        return
    token = start + tl.arange(0, TILE)
    new = (token >= before) & (token < length)
    row = first_row + token - before
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = new[:, None] & (channel < F.dim)
    angle = row[:, None] * angle_stride
    if POSITIONS:
        angle = tl.load(positions + row, new, 0)[:, None] * angle_stride
    if part >= 2:
        if ROPE:
            at = (head * GROUP + part - 2) * F.dim
            x = _turned(q + row[:, None] * q_stride + at, channel, inside, cos, sin, angle, F.dim // 2)
            tl.store(turned + row[:, None] * turned_stride + at + channel, x, inside)
        return
    block = head.to(tl.int64) * blocks + tl.load(tables + sequence.to(tl.int64) * table_stride + start // F.tokens)
    tail = block
    if TAIL is not None:
        tail = head.to(tl.int64) * tail_count + tl.load(tail_of + sequence)
    place = (start % F.tokens).to(tl.int32)
    newest = new & (token >= length - F.tokens)  # of the tokens in one place of the tail the last stays
    if part == 0:
        x = k + row[:, None] * k_stride + head * F.dim
        if ROPE:
            numbers = _turned(x, channel, inside, cos, sin, angle, F.dim // 2).to(tl.float32)
        else:
            numbers = tl.load(x + channel, inside, 0.0).to(tl.float32)
        _store(numbers, pool, scales, tails, block, tail, place, new, newest, F, TAIL, False)
    else:
        numbers = tl.load(v + row[:, None] * v_stride + head * F.dim + channel, inside, 0.0).to(tl.float32)
        _store(numbers, pool, scales, tails, block, tail, place, new, newest, F, TAIL, True)


def channels_of(format: KvFormat) -> int:
    return triton.next_power_of_2(format.width)


def warps_of(format: KvFormat) -> int:
    """16 numbers for a thread and 128 channels; at most 32."""
    return 4 if format.width <= 128 else 8


def _append(pool, tails, k, v, rows, lengths, tables, tail_of, format: KvFormat, rope=None) -> None:
    """``rope``: q, what becomes of it, cos, sin, positions."""
    check_aligned(pool=pool, tails=tails)
    if not k.numel() or not len(lengths):
        return
    q, turned, cos, sin, positions = rope or (k, k, k, k, None)  # what is not there is not read
    k, v, q = rows_of(k), rows_of(v), rows_of(q)
    rows, lengths, tables = rows.contiguous(), lengths.contiguous(), tables.contiguous()
    group = q.shape[1] // k.shape[1] if rope else 0
    kv_append_kernel[items(len(k), len(lengths), 1, TILE.value, MORE.value), len(pool), 2 + group](
        pool.view(VIEWS[format.type]), pool.view(torch.float16),
        pool if tails is None else tails.view(torch.bfloat16), k, v, q, turned, cos, sin,
        rows if positions is None else positions.contiguous(), rows, lengths, tables,
        tables if tail_of is None else tail_of.contiguous(),
        len(lengths), pool.shape[1], 0 if tails is None else tails.shape[1], tables.stride(0),
        k.stride(0), v.stride(0), q.stride(0), turned.stride(0), cos.stride(0),
        F=layout_of(format), TAIL=format.tail and layout_of(format.tail), CHANNELS=channels_of(format),
        ROPE=rope is not None, POSITIONS=positions is not None, GROUP=group,
        num_warps=warps_of(format), enable_fp_fusion=False,
    )  # fmt: skip


def kv_append(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens) -> None:
    """``torch.ops.memlm.kv_append``.  What ``rows``, ``lengths``, ``tables`` and ``tail_of`` hold is
    believed: to check it, the host would have to wait for the device."""
    format = _check(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens)
    _append(pool, tails, k, v, rows, lengths, tables, tail_of, format)


def rope_kv_append(
    pool, tails, q, k, v, cos, sin, positions, rows, lengths, tables, tail_of, type, block_tokens
) -> torch.Tensor:
    """Turns keys and queries to their positions and appends, as the C function memlm_cuda_rope_kv_append.

    ``q [T, heads, head_dim]`` is of k's dtype.  Token t takes row ``positions[t]``, int64 ``[T]``, of
    ``cos`` and ``sin``, f32 ``[angles, head_dim / 2]``; row t without positions.  (a, b), the channels i
    and i + head_dim / 2, become (a cos - b sin, b cos + a sin).  Returns the turned q; for the rest see
    memlm.ops.kv_append.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    format = _check(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens)
    check_heads("q", q)
    tokens, heads, dim = q.shape
    if dim % 2:
        raise ValueError(f"head_dim: got {dim}, RoPE takes even ones")
    if q.dtype != k.dtype or tokens != len(k) or dim != k.shape[2] or heads % k.shape[1]:
        raise ValueError(
            f"q: got {q.dtype} {list(q.shape)}, expected {k.dtype} [{len(k)}, a multiple of "
            f"{k.shape[1]}, {k.shape[2]}]"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != dim // 2 or len(x) != len(cos):
            raise ValueError(
                f"{name}: got {x.dtype} {list(x.shape)}, expected torch.float32 [{len(cos)}, {dim // 2}]"
            )
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != (tokens,)):
        raise ValueError(
            f"positions: got {positions.dtype} {list(positions.shape)}, expected torch.int64 [{tokens}]"
        )
    if positions is None and len(cos) < tokens:
        raise ValueError(f"cos: got {len(cos)} angles, {tokens} tokens without positions need as many")
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rope = (q, turned, cos.contiguous(), sin.contiguous(), positions)
    _append(pool, tails, k, v, rows, lengths, tables, tail_of, format, rope)
    return turned
