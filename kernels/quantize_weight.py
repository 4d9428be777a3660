"""``quantize_weight`` in Triton: the rounding that memlm/_rounding.py specifies, to the last bit.

Sums over a group are taken in the order of k, so a lane has a group of one row, which it goes through some 20
times; a program has LANES of them.  Rows are given transposed, ``[k, rows]``, so that lanes beside each other
read and write numbers beside each other.  All operations are single, rounded to nearest, and none are fused.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from memlm import _rounding
from memlm.formats import ACT_GROUP, TILE_ROWS, Format
from memlm.kernels.quantize_rows import ROUNDER
from memlm.ops.quantize_weight import _check

MIN_NORMAL = tl.constexpr(2.0**-126)
MOST_UNIT = tl.constexpr(2.0**126)
# Where in `tables` what begins: levels, bounds between them, and for each candidate the scale of a group's end,
# and the offset.
BOUNDS, ENDS, SHRINKS = tl.constexpr(16), tl.constexpr(32), tl.constexpr(40)
CANDIDATES = tl.constexpr(7)
LANES = 128


@triton.jit
def _code(x, tables, FIRST: tl.constexpr, LAST: tl.constexpr, LEVELS: tl.constexpr):
    """The nearest level's; of levels that are numbers the number itself."""
    if LEVELS:  # how many bounds lie below x: 8, 4, 2, 1 more
        code = tl.zeros(x.shape, tl.int32)
        for i in tl.static_range(4):
            code += tl.where(tl.load(tables + BOUNDS + code + ((8 >> i) - 1)) < x, 8 >> i, 0)
        return code
    clipped = tl.maximum(tl.minimum(x, LAST), FIRST)
    return (clipped + ROUNDER - ROUNDER).to(tl.int32)


@triton.jit
def _nearest(x, tables, FIRST: tl.constexpr, LAST: tl.constexpr, LEVELS: tl.constexpr):
    code = _code(x, tables, FIRST, LAST, LEVELS)
    return tl.load(tables + code) if LEVELS else code.to(tl.float32)


@triton.jit
def _inverse(s):
    """1 / s; 0 for subnormal s."""
    return tl.where(tl.abs(s) < MIN_NORMAL, 0.0, tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s))


@triton.jit
def _read(w, row, column, rows, k, real, OFFSETS: tl.constexpr):
    """0 beyond k, or where that could stretch the range the last weight again; -0 becomes 0."""
    if OFFSETS:
        column = tl.minimum(column, k - 1)
    x = tl.load(w + column.to(tl.int64) * rows + row, real & (column < k), 0.0).to(tl.float32)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _as_stored(x, scales):
    """As what scales have, back in f32."""
    return x.to(scales.dtype.element_ty).to(tl.float32)


@triton.jit
def _squared_error(
    w, row, column, rows, k, span, real, middle, inverse, s, o, tables,
    OFFSETS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    s = s * inverse
    o = (o - middle) * inverse
    to_levels = _inverse(s)
    total = tl.zeros(s.shape, tl.float32)
    for j in range(span):
        x = _read(w, row, column + j, rows, k, real, OFFSETS)
        if OFFSETS:
            x = (x - middle) * inverse - o
        else:
            x = x * inverse
        error = _nearest(x * to_levels, tables, FIRST, LAST, LEVELS) * s - x
        total += error * error
    return total


@triton.jit
def _refined(
    w, row, column, rows, k, span, real, middle, inverse, total, s, o, tables,
    OFFSETS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Least squares for scale and offset, given the codes that s and o round to."""
    to_levels = _inverse(s)
    dot = tl.zeros(s.shape, tl.float32)
    squares = tl.zeros(s.shape, tl.float32)
    count = tl.zeros(s.shape, tl.float32)
    for j in range(span):
        x = _read(w, row, column + j, rows, k, real, OFFSETS)
        if OFFSETS:
            x = (x - middle) * inverse
            value = _nearest((x - o) * to_levels, tables, FIRST, LAST, LEVELS)
            count += value
        else:
            x = x * inverse
            value = _nearest(x * to_levels, tables, FIRST, LAST, LEVELS)
        dot += x * value
        squares += value * value
    if not OFFSETS:
        return dot * _inverse(squares), o
    share = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), tl.zeros(s.shape, tl.float32) + span)
    mean = count * share
    dot = dot - total * mean
    squares = squares - count * mean
    s = dot * _inverse(squares)
    return s, total * share - s * mean


@triton.jit
def quantize_kernel(
    w, words, scales, offsets, largest, tables, rows, padded_rows, k, span, groups, row_words,
    BITS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr,
    OFFSETS: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    group, row = (lane // padded_rows).to(tl.int32), (lane % padded_rows).to(tl.int32)
    have = group < groups
    real = have & (row < rows)
    column = group * span
    if WHOLE:
        top = tl.load(largest + row, real, 0.0)
        middle = tl.zeros(top.shape, tl.float32)
    else:
        low = _read(w, row, column, rows, k, real, OFFSETS)
        high = low
        for j in range(1, span):
            x = _read(w, row, column + j, rows, k, real, OFFSETS)
            low = tl.minimum(x, low)
            high = tl.maximum(x, high)
        top = tl.where(high < -low, low, high)
        middle = tl.zeros(top.shape, tl.float32)
        if OFFSETS:
            low *= 0.5
            high *= 0.5
            top = high - low
            middle = low + high
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^e <= |top|
    unit = tl.maximum(tl.minimum(power, MOST_UNIT), MIN_NORMAL)
    inverse = tl.div_rn(tl.full(unit.shape, 1.0, tl.float32), unit)
    top = top * inverse
    o = middle
    if BITS == 8:
        s = _as_stored(tl.div_rn(tl.abs(top), tl.full(top.shape, 127.0, tl.float32)) * unit, scales)
    else:
        total = tl.zeros(top.shape, tl.float32)
        if OFFSETS:
            for j in range(span):
                total += (_read(w, row, column + j, rows, k, real, OFFSETS) - middle) * inverse
            o = _as_stored(-top * unit + middle, scales)
        s = _as_stored(top * tl.load(tables + ENDS) * unit, scales)
        error = _squared_error(w, row, column, rows, k, span, real, middle, inverse, s, o, tables,
                               OFFSETS, FIRST, LAST, LEVELS)  # fmt: skip
        least = tl.where(error < float("inf"), error, float("inf"))
        for i in range(CANDIDATES):
            s_i = top * tl.load(tables + ENDS + i)
            o_i = top * tl.load(tables + SHRINKS + i)
            s_i, o_i = _refined(w, row, column, rows, k, span, real, middle, inverse, total, s_i, o_i, tables,
                                OFFSETS, FIRST, LAST, LEVELS)  # fmt: skip
            s_i = _as_stored(s_i * unit, scales)
            o_i = _as_stored(o_i * unit + middle, scales) if OFFSETS else middle
            error = _squared_error(w, row, column, rows, k, span, real, middle, inverse, s_i, o_i, tables,
                                   OFFSETS, FIRST, LAST, LEVELS)  # fmt: skip
            wins = error < least
            s, o, least = tl.where(wins, s_i, s), tl.where(wins, o_i, o), tl.where(wins, error, least)
    tile, in_tile = (row // 16).to(tl.int64), row % 16
    if WHOLE:
        tl.store(scales + row, tl.where(real, s, 0.0).to(scales.dtype.element_ty), have & (group == 0))
    else:
        place = (tile * groups + group) * 16 + in_tile
        tl.store(scales + place, tl.where(real, s, 0.0).to(scales.dtype.element_ty), have)
        if OFFSETS:
            tl.store(offsets + place, tl.where(real, o, 0.0).to(scales.dtype.element_ty), have)

    FIELDS: tl.constexpr = 32 // BITS
    o = (o - middle) * inverse
    to_levels = _inverse(s * inverse)
    for i in range(span // FIELDS):
        word = tl.zeros([LANES], tl.int32)
        for field in tl.static_range(FIELDS):
            at = column + i * FIELDS + field
            x = (_read(w, row, at, rows, k, real, OFFSETS) - middle) * inverse
            code = _code((x - o) * to_levels, tables, FIRST, LAST, LEVELS) + ZERO
            placed = (code & ((1 << BITS) - 1)) << (8 * (field % 4) + BITS * (field // 4))
            word |= tl.where(real & (at < k), placed, 0)
        tl.store(words + (tile * row_words + group * (span // FIELDS) + i) * 16 + in_tile, word, have)


def _levels(format: Format) -> tuple[float, ...]:
    """What may be rounded to, of 8 bits the first and the last."""
    return (-127.0, 127.0) if format.bits == 8 else format.levels[: len(format.codes)]


@functools.cache
def _tables(format: Format, device: torch.device) -> torch.Tensor:
    """What the kernel looks up, f32 [48], copied there once."""
    levels, table = _levels(format), torch.zeros(48)
    if format.codebook == "nf":
        table[:16] = torch.tensor(levels)
        table[16:31] = (table[1:16] + table[:15]) / 2
    if format.bits < 8:
        reach = max(levels, key=abs) if format.symmetric else levels[-1] / 2
        shrinks = _rounding._SHRINK[len(levels)]
        table[32:39] = torch.tensor([shrink / reach for shrink in shrinks])
        table[40:47] = -torch.tensor(shrinks)
    return table.to(device)


CHUNK = 1 << 25  # weights transposed at a time


def quantize_weight(w, bits, codebook, group, has_offsets, scale_dtype, lanes: int = LANES):
    """``torch.ops.memlm.quantize_weight``.  ``lanes``: groups that a program has."""
    format, layout = _check(w, bits, codebook, group, has_offsets, scale_dtype)
    n, k = w.shape
    parts = {name: torch.empty(shape, dtype=dtype, device=w.device) for name, (shape, dtype) in layout.items()}
    offsets = parts.get("offsets", w.new_empty(0, dtype=scale_dtype))
    whole = group == 0
    span = group or ACT_GROUP
    groups = format.padded_k(k) // span
    first, *_, last = _levels(format)
    tables, nf = _tables(format, w.device), format.codebook == "nf"
    zero = 0 if nf or bits == 8 else int(-first)
    step = max(1, CHUNK // (k * TILE_ROWS)) * TILE_ROWS
    for row in range(0, n, step):
        some = w[row : row + step]
        rows = len(some)
        padded_rows = -(-rows // TILE_ROWS) * TILE_ROWS
        tile = slice(row // TILE_ROWS, (row + padded_rows) // TILE_ROWS)
        largest = some.abs().amax(1).float() if whole else tables  # what is not there is not read
        quantize_kernel[(triton.cdiv(padded_rows * groups, lanes),)](
            some.T.contiguous(), parts["codes"][tile].view(torch.int32), parts["scales"][tile],
            offsets[tile] if has_offsets else tables, largest, tables, rows, padded_rows, k, span, groups,
            format.padded_k(k) * bits // 32, BITS=bits, FIRST=first, LAST=last,
            ZERO=zero, LEVELS=nf, OFFSETS=has_offsets, WHOLE=whole, LANES=lanes, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return parts["codes"], parts["scales"], offsets
