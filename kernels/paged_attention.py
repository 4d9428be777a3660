"""``paged_attention`` in Triton: over keys and values in blocks, read as they are stored
(memlm/kv_formats.py).

A program has BLOCK_M query rows of one sequence and key-value head: the query heads of that head, times
their new tokens, so that the cache is read once for all of them.  It goes through its tokens 32 at a time,
which lie in one block, and through channels in groups, of codes those that share a scale:

    scores [rows, tokens]      = sum over groups  (queries [rows, group] keys^T) * keys' scales
    sums [rows, group], each   = factor * sums + (weights * values' scales) values

Codes are read as 32-bit words, of which a key has one for 4 or 8 channels, a channel of values one for 4
or 8 tokens.  Field j of a word is at bit 8 j, or of nibbles at 8 (j % 4) + 4 (j // 4).

Sequences with few new tokens are shared out along their length as well, in chunks of a size that depends on
the longest length alone: each program stores its sums, and a second kernel adds them up in the order of
tokens (flash-decoding).  What a sequence's result is depends on nothing else in the step: configurations differ
in rows and warps alone.

Arithmetic, of products in bf16, with f32 sums:

    keys, values   codes and bf16 as they are; f32 as the sum of two bf16
    queries        f32 after scale and Hadamard transform for int8 and int4, then as the sum of two bf16; of
                   floats as they are, f16 in two bf16
    weights        exponentials, times the values' scale, as bf16; for f16 results as the sum of two

On compute capability 7.5, for which Triton has no matrix instructions, products are those of f32 numbers.

An int4 cache's newest block is read from its tail, as bf16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from memlm.kernels import UnsupportedError
from memlm.kernels._kv import (
    TILE, VIEWS, Layout, butterfly, check_aligned, first_item, items, layout_of, rows_of, sequence_of,
)  # fmt: skip
from memlm.kernels._targets import Target, fits
from memlm.kernels._weight_only import _unpack, about, target_of
from memlm.ops.paged_attention import _check

LOG2E = tl.constexpr(1.44269504)
STEP = tl.constexpr(32)  # tokens at a time: they lie in one block, whatever its size
MORE = tl.constexpr(1)
SPLIT_ROWS = 16  # of a sequence whose length is shared out
LEAST_CHUNK, MOST_CHUNKS = 256, 32  # tokens; programs of a sequence


# ---- Rows as tuples of groups of channels ----


@triton.jit
def _zeros(ROWS: tl.constexpr, F: tl.constexpr):
    parts = ()
    GROUPS: tl.constexpr = F.groups
    GROUP: tl.constexpr = F.group
    for _ in tl.static_range(GROUPS):
        parts = parts + (tl.zeros([ROWS, GROUP], tl.float32),)
    return parts


@triton.jit
def _across(parts, STEP: tl.constexpr):
    """Of a transform what mixes groups that are STEP apart."""
    made = ()
    for g in tl.static_range(len(parts)):
        if g // STEP % 2 == 0:
            made = made + (parts[g] + parts[g + STEP],)
        else:
            made = made + (parts[g - STEP] - parts[g],)
    return made


@triton.jit
def _transformed(parts, F: tl.constexpr):
    """Rows after the Hadamard transform, its own inverse."""
    for i in tl.static_range(9):
        if 1 << i < F.piece:
            made = ()
            if 1 << i < F.group:
                for g in tl.static_range(len(parts)):
                    made = made + (butterfly(parts[g], 1 << i),)
            else:
                made = _across(parts, (1 << i) // F.group)
            parts = made
    made = ()
    for g in tl.static_range(len(parts)):
        made = made + (parts[g] * F.root,)
    return made


@triton.jit
def _parts(x, MATH: tl.constexpr, PARTS: tl.constexpr):
    """x as the sum of PARTS tensors of MATH."""
    first = x.to(MATH)
    parts = (first,)
    if PARTS == 2:
        parts = parts + ((x.to(tl.float32) - first.to(tl.float32)).to(MATH),)
    return parts


@triton.jit
def _product(a, b, sums):
    """sums + a b, of numbers in parts."""
    for i in tl.static_range(len(a)):
        for j in tl.static_range(len(b)):
            sums = tl.dot(a[i], b[j], sums, input_precision="ieee")
    return sums


@triton.jit
def _queries(q, inside, scale, F: tl.constexpr, MATH: tl.constexpr, PARTS: tl.constexpr):
    """Query rows at q [rows, 1] as products take them: a tuple of groups, each of parts."""
    rows = ()
    GROUPS: tl.constexpr = F.groups
    for g in tl.static_range(GROUPS):
        channel = g * F.group + tl.arange(0, F.group)[None, :]
        x = tl.load(q + channel, inside & (channel < F.dim), 0.0)
        rows = rows + (x.to(tl.float32) * scale if F.coded else x,)
    if F.coded:
        rows = _transformed(rows, F)
    made = ()
    for g in tl.static_range(GROUPS):
        made = made + (_parts(rows[g], MATH, PARTS),)
    return made


# ---- Blocks.  A step's tokens lie in one, from `place` on: 32 of them, a multiple of 32 ----


@triton.jit
def _numbers(codes, BITS: tl.constexpr, MATH: tl.constexpr):
    ZERO: tl.constexpr = 0 if BITS == 8 else 1 << (BITS - 1)
    if MATH == tl.float32:
        numbers = ((codes ^ 0x80) - 0x80 if BITS == 8 else codes - ZERO).to(tl.float32)
    else:
        numbers = _unpack(codes, None, MATH, BITS, ZERO, False)
    return numbers


@triton.jit
def _fields(words, BITS: tl.constexpr):
    """words [rows, columns] -> their codes, as so many rows more."""
    field = tl.arange(0, 32 // BITS)[None, :, None]
    shift = 8 * (field % 4) + BITS * (field // 4)
    codes = (words[:, None, :] >> shift) & ((1 << BITS) - 1)
    return tl.reshape(codes, [words.shape[0] * (32 // BITS), words.shape[1]])


@triton.jit
def _keys(block, place, g, F: tl.constexpr, MATH: tl.constexpr):
    """Keys of a step, of channels of group g: [group, tokens] in parts."""
    token = place + tl.arange(0, STEP)[None, :]
    if F.coded:
        tile = token // TILE * (F.width * F.key_bits // 2)
        if F.key_bits == 8:
            four = g * (F.group // 4) + tl.arange(0, F.group // 4)[:, None]
            codes = _fields(tl.load(block + tile + four * TILE + token % TILE), 8)
            keys = (_numbers(codes, 8, MATH),)
        else:
            # For 32 channels 64 words of nibbles, then 16 of fifth bits, of 8 tokens and 4 channels each.
            eight = g * (F.group // 8) + tl.arange(0, F.group // 8)[:, None]
            nibbles = _fields(tl.load(block + tile + eight // 4 * 80 + eight % 4 * TILE + token % TILE), 4)
            token = place + 8 * tl.arange(0, STEP // 8)[None, :]
            four = g * (F.group // 4) + tl.arange(0, F.group // 4)[:, None]
            tile = token // TILE * (F.width * F.key_bits // 2) + four // 8 * 80 + 64
            words = tl.load(block + tile + four % 8 * 2 + token % TILE // 8)
            shift = tl.arange(0, 4)[None, :, None, None] + 4 * tl.arange(0, 8)[None, None, None, :]
            fifth = tl.reshape((words[:, None, :, None] >> shift) & 1, [F.group, STEP])
            keys = (_numbers(nibbles | fifth << 4, 5, MATH),)
    else:
        channel = g * F.group + tl.arange(0, F.group)[:, None]
        at = token // TILE * (F.channels * TILE) + channel * TILE + token % TILE
        x = tl.load(block + at, channel < F.channels, 0.0)
        keys = _parts(x, MATH, 2 if F.key_bits == 32 and MATH != tl.float32 else 1)
    return keys


@triton.jit
def _values(block, place, exists, g, F: tl.constexpr, MATH: tl.constexpr):
    """Values of a step, of channels of group g: [tokens, group] in parts."""
    channel = g * F.group + tl.arange(0, F.group)[None, :]
    OF_LOAD: tl.constexpr = 32 // F.value_bits if F.coded else 1  # tokens
    token = place // OF_LOAD + tl.arange(0, STEP // OF_LOAD)[:, None]
    at = (channel // TILE * (F.tokens // OF_LOAD) + token) * TILE + channel % TILE
    if F.coded:
        codes = _fields(tl.load(block + F.values // 4 + at), F.value_bits)
        values = (_numbers(codes, F.value_bits, MATH),)
    else:
        # What is not there becomes 0: it may be NaN.
        x = tl.load(block + F.values + at, exists[:, None] & (channel < F.width), 0.0)
        values = _parts(x, MATH, 2 if F.value_bits == 32 and MATH != tl.float32 else 1)
    return values


@triton.jit
def _attend(
    state, queries, pool, scales, table, base, lo, hi, position, scale, window, softcap, slope,
    F: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """All tokens from lo to hi - 1, into sums, their rows' maxima and totals.  Their blocks are base +
    table[t // tokens], or with TAIL base."""
    sums, most, total = state
    for start in range(lo // STEP * STEP, hi, STEP):
        number, place = base, start % F.tokens
        if not TAIL:
            number += tl.load(table + start // F.tokens)
        block, steps_of = pool + number * (F.block // (4 if F.coded else 1)), scales + number * (F.block // 2)
        token = place + tl.arange(0, STEP)
        t = start + tl.arange(0, STEP)
        exists = (t >= lo) & (t < hi)
        scores = tl.zeros([most.shape[0], STEP], tl.float32)
        for g in tl.static_range(len(sums)):
            keys = _keys(block, place, g, F, MATH)
            if F.coded:
                at = F.key_scales + (token // TILE * F.groups + g) * TILE + token % TILE
                steps = tl.load(steps_of + at).to(tl.float32)
                scores += _product(queries[g], keys, tl.zeros([most.shape[0], STEP], tl.float32)) * steps[None, :]
            else:
                scores = _product(queries[g], keys, scores)
        if not F.coded:
            scores *= scale
        if SOFTCAP:  # tanh x = 1 - 2 / (e^2x + 1)
            scores = softcap * (1 - 2 / (tl.exp2(scores / softcap * (2 * LOG2E)) + 1))
        distance = position[:, None] - t[None, :]
        if SLOPES:
            scores -= slope[:, None] * distance.to(tl.float32)
        seen = exists[None, :] & (distance >= 0)
        if WINDOW:
            seen = seen & (distance < window)
        scores = tl.where(seen, scores, float("-inf"))
        best = tl.maximum(most, tl.max(scores, 1))
        origin = tl.where(best == float("-inf"), 0.0, best)
        weights = tl.exp2((scores - origin[:, None]) * LOG2E)
        factor = tl.exp2((most - origin) * LOG2E)
        most, total = best, total * factor + tl.sum(weights, 1)
        made = ()
        for g in tl.static_range(len(sums)):
            scaled = weights
            if F.coded:  # who does not see a token does not see that its scale is NaN either
                steps = tl.load(steps_of + F.value_scales + g * F.tokens + token).to(tl.float32)
                scaled = tl.where(weights != 0, weights * steps[None, :], 0.0)
            values = _values(block, place, exists, g, F, MATH)
            made = made + (_product(_parts(scaled, MATH, WEIGHT_PARTS), values, sums[g] * factor[:, None]),)
        sums = made
    return sums, most, total


# ---- Results ----


@triton.jit
def _finish(sums, most, total, sinks, head, out, inside, F: tl.constexpr, SINKS: tl.constexpr):
    """Sums as a result, at out [rows, 1]."""
    norm = 1 / total
    if SINKS:
        sink = tl.load(sinks + head)
        base = tl.maximum(sink, most)
        factor = tl.exp2((most - base) * LOG2E)
        norm = factor / (total * factor + tl.exp2((sink - base) * LOG2E))
    if F.coded:
        sums = _transformed(sums, F)
    for g in tl.static_range(len(sums)):
        channel = g * F.group + tl.arange(0, F.group)[None, :]
        result = (sums[g] * norm[:, None]).to(out.dtype.element_ty)
        tl.store(out + channel, result, inside[:, None] & (channel < F.dim))


@triton.jit
def _slot(row, sequence, token, split_tokens, SLOTS_ARE_ROWS: tl.constexpr):
    """Where a row's parts are: by its own number, or where those would be more, by one of split_tokens of
    each sequence."""
    return row if SLOTS_ARE_ROWS else sequence.to(tl.int64) * split_tokens + token


@triton.jit
def paged_attention_kernel(
    q, pool, scales, tails, rows, lengths, tables, tail_of, slopes, sinks, out, sums_of, most_of, total_of,
    sequences, blocks, tail_count, table_stride, q_stride, heads, scale, window, softcap,
    chunk, splits, split_tokens, rows_about,
    F: tl.constexpr, TAIL: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, SLOTS_ARE_ROWS: tl.constexpr,
    QUERY_PARTS: tl.constexpr, WEIGHT_PARTS: tl.constexpr, MATH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = sequence_of(rows, sequences, item, GROUP, BLOCK_M, MORE)
    first_row = tl.load(rows + sequence)
    count = (tl.load(rows + sequence + 1) - first_row).to(tl.int32)
    length = tl.load(lengths + sequence).to(tl.int32)
    first = (item - first_item(first_row, sequence, GROUP, BLOCK_M, MORE)).to(tl.int32) * BLOCK_M
    if first >= count * GROUP:
        return
    i = first + tl.arange(0, BLOCK_M)
    inside, token, before = i < count * GROUP, i // GROUP, length - count
    position, row, head = before + token, first_row + token, kv_head * GROUP + i % GROUP
    # What its queries see.
    lo, hi = 0, before + tl.minimum(first + BLOCK_M - 1, count * GROUP - 1) // GROUP + 1
    if WINDOW:
        lo = tl.maximum(0, before + first // GROUP - window + 1)
    is_split = False
    if SPLIT:
        is_split = count <= split_tokens
        lo = tl.maximum(lo, tl.where(is_split, split * chunk, 0))
        hi = tl.minimum(hi, tl.where(is_split, (split + 1) * chunk, tl.where(split == 0, hi, 0)))
        if lo >= hi:
            return

    at = row[:, None] * q_stride + head[:, None] * F.dim
    queries = _queries(q + at, inside[:, None], scale, F, MATH, QUERY_PARTS)
    slope = i
    if SLOPES:
        slope = tl.load(slopes + head)
    state = (_zeros(BLOCK_M, F), tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32))
    table = tables + sequence.to(tl.int64) * table_stride
    base = kv_head.to(tl.int64) * blocks
    stored_end = hi
    if TAIL is not None:
        newest = (length - 1) // F.tokens * F.tokens
        stored_end = tl.minimum(hi, newest)
    state = _attend(state, queries, pool, scales, table, base, lo, stored_end, position, scale, window,
                    softcap, slope, F, False, WINDOW, SOFTCAP, SLOPES, WEIGHT_PARTS, MATH)  # fmt: skip
    if TAIL is not None:
        base = kv_head.to(tl.int64) * tail_count + tl.load(tail_of + sequence)
        state = _attend(state, queries, tails, scales, table, base, tl.maximum(lo, newest), hi, position, 1.0, window,
                        softcap, slope, TAIL, True, WINDOW, SOFTCAP, SLOPES, WEIGHT_PARTS, MATH)  # fmt: skip
    sums, most, total = state

    if is_split:
        part = (_slot(row, sequence, token, split_tokens, SLOTS_ARE_ROWS) * heads + head) * splits + split
        tl.store(most_of + part, most, inside)
        tl.store(total_of + part, total, inside)
        for g in tl.static_range(len(sums)):
            channel = g * F.group + tl.arange(0, F.group)[None, :]
            tl.store(sums_of + part[:, None] * (F.groups * F.group) + channel, sums[g], inside[:, None])
    else:
        to = out + (row * heads + head)[:, None] * F.dim
        _finish(sums, most, total, sinks, head, to, inside, F, SINKS)


@triton.jit
def combine_kernel(
    rows, lengths, sinks, out, sums_of, most_of, total_of, sequences, heads, window, chunk, splits, split_tokens,
    F: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    SLOTS_ARE_ROWS: tl.constexpr,
):  # fmt: skip
    """The result of a row that was shared out, of the query heads of one key-value head."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence = sequence_of(rows, sequences, row, 1, 1, 0)
    first_row, end_row = tl.load(rows + sequence), tl.load(rows + sequence + 1)
    if (row >= end_row) | (end_row - first_row > split_tokens):
        return
    token = row - first_row
    position = (tl.load(lengths + sequence) - (end_row - row)).to(tl.int32)
    begin, end = 0, position // chunk + 1
    if WINDOW:
        begin = tl.maximum(0, position - window + 1) // chunk
    i = tl.arange(0, HEADS)
    inside, head = i < GROUP, kv_head * GROUP + tl.minimum(i, GROUP - 1)
    part = (_slot(row, sequence, token, split_tokens, SLOTS_ARE_ROWS) * heads + head) * splits
    most = tl.full([HEADS], float("-inf"), tl.float32)
    for split in range(begin, end):
        most = tl.maximum(most, tl.load(most_of + part + split))
    total, sums = tl.zeros([HEADS], tl.float32), _zeros(HEADS, F)
    for split in range(begin, end):
        factor = tl.exp2((tl.load(most_of + part + split) - most) * LOG2E)
        total = total + tl.load(total_of + part + split) * factor
        made = ()
        for g in tl.static_range(len(sums)):
            channel = g * F.group + tl.arange(0, F.group)[None, :]
            x = tl.load(sums_of + (part + split)[:, None] * (F.groups * F.group) + channel)
            made = made + (sums[g] + x * factor[:, None],)
        sums = made
    to = out + (row * heads + head)[:, None] * F.dim
    _finish(sums, most, total, sinks, head, to, inside, F, SINKS)


# ---- The host's side ----

# Decoding has few rows, and reads the cache as fast as it comes: small tiles, several stages.  Prefill
# multiplies: more rows for each number that is unpacked.  8 warps are for registers that do not suffice 4.
SPACE = [
    triton.Config({"BLOCK_M": m}, num_warps=warps, num_stages=stages)
    for m, warps, stages in ((16, 4, 2), (16, 4, 3), (16, 8, 1), (32, 4, 2), (64, 4, 2))
]
NEED = {"gfx1100": 10}  # registers for each number, where they are more than Target's


def parts_of(layout: Layout, dtype: torch.dtype, math: torch.dtype) -> tuple[int, int]:
    """As how many numbers of ``math`` queries and weights are multiplied."""
    if math == torch.float32:
        return 1, 1
    return 2 if layout.coded or dtype != math else 1, 2 if dtype == torch.float16 else 1


def math_of(target: Target) -> torch.dtype:
    return torch.float32 if target.arch == 75 else torch.bfloat16


def pruned(target: Target, layout: Layout, rows: int, query_parts: int) -> list[triton.Config]:
    """The configurations that a target has room for and that waste no more than half of ``rows``, those of
    a sequence."""
    found, width = [], layout.group * layout.groups
    target = replace(target, need=NEED.get(target.arch, target.need))
    as_they_are = layout.key_bits == 16 and math_of(target) == torch.bfloat16
    for config in SPACE:
        m = config.kwargs["BLOCK_M"]
        shared = config.num_stages * STEP.value * width * (layout.key_bits + layout.value_bits) // 8
        # Sums, queries, scores; and what keys and values are made into, unless multiplied as they are: targets
        # that need more for sums make copies of operands.
        numbers = m * ((1 + query_parts) * width + STEP.value)
        numbers += 0 if as_they_are else STEP.value * layout.group * target.need // 4
        if fits(target, shared, numbers, config.num_warps * target.warp) and (m == 16 or m < 2 * rows):
            found.append(config)
    return found


def _prune(_, named, **constants):
    target = target_of(named["q"].device)
    return pruned(target, constants["F"], named["rows_about"], constants["QUERY_PARTS"])


tuned_kernel = triton.autotune(
    SPACE, key=["rows_about", "F", "GROUP", "SPLIT"], prune_configs_by={"early_config_prune": _prune}
)(paged_attention_kernel)


def paged_attention(
    q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap, slopes, sinks,
    config: triton.Config | None = None, math: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """``torch.ops.memlm.paged_attention``, of f16 and bf16.  What ``rows``, ``lengths``, ``tables`` and
    ``tail_of`` hold is believed: to check it, the host would have to wait for the device.

    ``config``: this one instead of the one that is found fastest; ``math``: products of bf16 or f32,
    instead of what suits the device.

    Raises UnsupportedError for a q of another dtype, and for heads too large for the device's registers.
    """
    format = _check(
        q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap, slopes,
        sinks,
    )  # fmt: skip
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(f"q: got {q.dtype}, Triton kernels take f16 and bf16")
    check_aligned(pool=pool, tails=tails)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.numel() or not len(lengths):
        return out
    layout, view = layout_of(format), VIEWS[format.type]
    if math is None:
        math = math_of(target_of(q.device))
    query_parts, weight_parts = parts_of(layout, q.dtype, math)
    if config is None and not pruned(target_of(q.device), layout, 1, query_parts):
        raise UnsupportedError(
            f"pool: head_dim = {format.dim} of {format.type} needs more registers than the device has"
        )
    q, rows, lengths, tables = rows_of(q), rows.contiguous(), lengths.contiguous(), tables.contiguous()
    count, heads, kv_heads, sequences = len(q), q.shape[1], len(pool), len(lengths)
    group = heads // kv_heads

    longest = tables.shape[1] * block_tokens
    chunk = max(LEAST_CHUNK, triton.cdiv(triton.cdiv(longest, MOST_CHUNKS), LEAST_CHUNK) * LEAST_CHUNK)
    splits, split_tokens = max(1, triton.cdiv(longest, chunk)), max(1, SPLIT_ROWS // group)
    slots = min(count, sequences * split_tokens)
    parts = slots * heads * splits if splits > 1 else 1
    sums, most, total = (
        torch.empty(parts * size, dtype=torch.float32, device=q.device)
        for size in (layout.groups * layout.group, 1, 1)
    )

    def given(x):
        return rows if x is None else x.contiguous()  # what is not there is not read

    def grid(meta):
        return items(count, sequences, group, meta["BLOCK_M"], MORE.value), kv_heads, splits

    flags = {"F": layout, "GROUP": group, "WINDOW": window > 0, "SINKS": sinks is not None}
    flags["SLOTS_ARE_ROWS"] = slots == count
    settings = {} if config is None else config.all_kwargs()
    kernel = tuned_kernel if config is None else paged_attention_kernel
    kernel[grid](
        q, pool.view(torch.int32 if format.quantized else view), pool.view(torch.float16),
        pool if tails is None else tails.view(torch.bfloat16), rows, lengths, tables, given(tail_of),
        given(slopes), given(sinks), out, sums, most, total,
        sequences, pool.shape[1], 0 if tails is None else tails.shape[1], tables.shape[1], q.stride(0), heads,
        scale, window, softcap, chunk, splits, split_tokens, about(triton.cdiv(count * group, sequences)),
        TAIL=format.tail and layout_of(format.tail), SOFTCAP=softcap > 0, SLOPES=slopes is not None,
        SPLIT=splits > 1, QUERY_PARTS=query_parts, WEIGHT_PARTS=weight_parts,
        MATH=tl.float32 if math == torch.float32 else tl.bfloat16,
        **flags, **settings,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[count, kv_heads](
            rows, lengths, given(sinks), out, sums, most, total, sequences, heads, window, chunk, splits,
            split_tokens, HEADS=triton.next_power_of_2(group), **flags,
        )  # fmt: skip
    return out
