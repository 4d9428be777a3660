"""What the kernels over sparse matrices share (memlm/sparse_formats.py draws them): reading what is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._weight_only import _fields, _unpack, levels_on
from memlm.formats import ZEROS
from memlm.sparse_formats import SparseTensors


@triton.jit
def _block(codes, levels, block, DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr):
    """A block [32 k, 16 rows] of W: codes as numbers of DTYPE, floats as they are.  ``codes``: 32-bit words
    of codes, or floats."""
    row = tl.arange(0, 16)
    if BITS >= 16:
        w = tl.load(codes + (block * 32 + tl.arange(0, 32))[:, None] * 16 + row[None, :])
    else:
        word = tl.load(codes + (block * BITS + tl.arange(0, BITS))[None, :] * 16 + row[:, None])
        w = tl.trans(_unpack(_fields(word, BITS, 16, 32), levels, DTYPE, BITS, ZERO, LEVELS))
    return w


@triton.jit
def _ones(words):
    """How many bits of each uint32 are set, int32."""
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words += words >> 8
    return ((words + (words >> 16)) & 63).to(tl.int32)


@triton.jit
def _bits(places, at, inside):
    """The bitmaps of 16 x 4 each: of rows 0 to 7, and of rows 8 to 15; and how many are set in the former,
    and bytes of codes that both have."""
    low = tl.load(places + 2 * at, inside, 0).to(tl.uint32, bitcast=True)
    high = tl.load(places + 2 * at + 1, inside, 0).to(tl.uint32, bitcast=True)
    in_low = _ones(low)
    return low, high, in_low, (in_low + _ones(high) + 1) >> 1


@triton.jit
def _bytes_before(places, starts, tile, tiles, fours, end, BITMAP: tl.constexpr):
    """Bytes of codes before k = 4 ``end`` of each tile, from the 32-bit word on in which they begin."""
    CHUNK: tl.constexpr = 64
    count = tl.zeros_like(tile).to(tl.int32)
    if BITMAP:
        count += (tl.load(starts + tile, tile < tiles, 0) & 3).to(tl.int32)
        for first in range(0, end, CHUNK):
            four = first + tl.arange(0, CHUNK)
            inside = (tile < tiles)[:, None] & (four < end)[None, :]
            _, _, _, size = _bits(places, (tile * fours)[:, None] + four[None, :], inside)
            count += tl.sum(size, 1)
    return count


@triton.jit
def _two_of_four(codes, places, row, inside, at, ZERO: tl.constexpr):
    """Of 4 k each, 4 codes of 4 bits."""
    code = tl.load(codes + at * 16 + row, inside, 0).to(tl.int32)
    place = tl.load(places + 2 * at + row % 2, inside, 0) >> (row // 2 * 4)
    first, second = ((code & 15) ^ ZERO) << (place & 3) * 4, ((code >> 4) ^ ZERO) << (place >> 2 & 3) * 4
    return ZERO * 0x1111 ^ first ^ second


@triton.jit
def _stored(codes, starts, places, before, tile, tiles, inside, at, ZERO: tl.constexpr):
    """Of 4 k each, 4 codes of 4 bits, [tiles, 16, fours]; and :func:`_bytes_before` of what follows."""
    low, high, in_low, size = _bits(places, at, inside)
    nibble = 2 * (before[:, None] + tl.cumsum(size, 1) - size)
    row = tl.arange(0, 16)[None, :, None]
    upper = row >= 8
    word = tl.where(upper, high[:, None, :], low[:, None, :])
    shift = row % 8 * 4
    nibble = nibble[:, None, :] + tl.where(upper, in_low[:, None, :], 0) + _ones(word & ((1 << shift) - 1))
    kept = (word >> shift) & 15
    place = codes + (tl.load(starts + tile, tile < tiles, 0) >> 2)[:, None, None] + (nibble >> 3)
    bits = tl.load(place, kept != 0, 0).to(tl.uint32, bitcast=True)
    next_bits = tl.load(place + 1, kept != 0, 0).to(tl.uint32, bitcast=True)
    shift = nibble % 8 * 4
    bits = (bits >> shift) | (next_bits << 1 << (31 - shift))
    found = tl.zeros_like(bits)
    for j in tl.static_range(4):
        here = (kept >> j) & 1
        found |= tl.where(here != 0, bits & 15, ZERO) << 4 * j
        bits >>= 4 * here
    return found.to(tl.int32, bitcast=True), before + tl.sum(size, 1)


@triton.jit
def _expanded(
    codes, places, starts, before, first_tile, tiles, four, fours,
    BITMAP: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes [ROWS, COLUMNS] from k = 4 ``four`` on, with those of zero where nothing is stored; and
    :func:`_bytes_before` of what follows."""
    FOURS: tl.constexpr = COLUMNS // 4
    ZERO: tl.constexpr = 7 if LEVELS else 8
    at = four + tl.arange(0, FOURS)
    if BITMAP:
        tile = first_tile.to(tl.int64) + tl.arange(0, ROWS // 16)
        inside = (tile < tiles)[:, None] & (at < fours)[None, :]
        at = (tile * fours)[:, None] + at[None, :]
        found, before = _stored(codes, starts, places, before, tile, tiles, inside, at, ZERO)
        found = tl.reshape(found, [ROWS, FOURS])
    else:
        row = first_tile * 16 + tl.arange(0, ROWS)
        tile = (row // 16).to(tl.int64)
        inside = (tile < tiles)[:, None] & (at < fours)[None, :]
        at = (tile * fours)[:, None] + at[None, :]
        found = _two_of_four(codes, places, (row % 16)[:, None], inside, at, ZERO)
    q = (found[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :]) & 15
    return tl.reshape(q, [ROWS, COLUMNS]), before


def block_arguments(packed: SparseTensors) -> tuple[tuple, dict]:
    """What kernels take of a W of blocks: codes, scales, offsets and levels, or None for what there is
    not; and constants."""
    codes, format = packed.codes, packed.format
    if format.is_float:
        constants = {"BITS": format.bits, "ZERO": 0, "LEVELS": False, "OFFSETS": False}
        return (codes, None, None, None), constants
    levels = levels_on(codes.device) if format.values.codebook == "nf" else None
    constants = {
        "BITS": format.bits, "ZERO": ZEROS[format.bits] if format.symmetric else 0,
        "LEVELS": levels is not None, "OFFSETS": packed.offsets is not None,
    }  # fmt: skip
    return (codes.view(torch.int32), packed.scales, packed.offsets, levels), constants


def tiles_of(starts: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """int64: the tile of each of these blocks (int64)."""
    return torch.searchsorted(starts, blocks, right=True) - 1


def compressed_arguments(packed: SparseTensors) -> tuple[tuple, tuple, dict]:
    """What kernels take of a W of pattern 2:4 or unstructured: codes, places, starts, scales and levels, or
    None for what there is not; tiles, and how many 4 k they have; and constants."""
    codes, format = packed.codes, packed.format
    bitmap = format.pattern == "unstructured"
    if bitmap:  # as 32-bit words; of the spare bytes behind them the last few are not needed
        codes = codes.clone() if codes.storage_offset() % 4 else codes
        codes = codes[: len(codes) // 4 * 4].view(torch.int32)
    levels = levels_on(codes.device) if format.values.codebook == "nf" else None
    tensors = (codes, packed.places.view(torch.int32), packed.starts, packed.scales, levels)
    constants = {"BITMAP": bitmap, "LEVELS": levels is not None}
    return tensors, (packed.tiles, packed.places.shape[1]), constants
