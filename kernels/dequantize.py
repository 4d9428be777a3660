"""``dequantize`` in Triton, and the kernel of ``embedding``: rows of a packed W as floats.

A program takes BLOCK_R rows by BLOCK_K columns.  A weight is ``s * q``, plus an offset, each rounded to
f32 as memlm/formats.py does: the two must not be fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.formats import ZEROS, Packed
from memlm.kernels._weight_only import _fields, _unpack, levels_on
from memlm.ops import _matmul


@triton.jit
def rows_kernel(
    words, scales, offsets, levels, ids, y, row, rows, n, k, blocks, groups, group,
    BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, OFFSETS: tl.constexpr, IDS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    FIELDS: tl.constexpr = 32 // BITS
    at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = tl.load(ids + at, at < rows, 0) if IDS else row + at
    exists = (at < rows) & (source >= 0) & (source < n)
    tile, lane = source // 16, source % 16
    block = tl.program_id(1) * (BLOCK_K // FIELDS) + tl.arange(0, BLOCK_K // FIELDS)
    place = ((tile * blocks)[:, None] + block[None, :]) * 16 + lane[:, None]
    word = tl.load(words + place, exists[:, None] & (block < blocks)[None, :], 0)
    value = _unpack(_fields(word, BITS, BLOCK_R, BLOCK_K), levels, tl.float32, BITS, ZERO, LEVELS)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = exists[:, None] & (column < k)[None, :]
    of = ((tile * groups)[:, None] + (column // group)[None, :]) * 16 + lane[:, None]
    w = value * tl.load(scales + of, inside, 0.0).to(tl.float32)
    if OFFSETS:
        w += tl.load(offsets + of, inside, 0.0).to(tl.float32)
    w = tl.where(exists[:, None], w, float("nan"))
    tl.store(y + at[:, None] * k + column[None, :], w.to(y.dtype.element_ty), (at < rows)[:, None] & (column < k)[None, :])  # fmt: skip


BLOCK_K = 128


def rows_of(packed: Packed, row: int, rows: int, dtype: torch.dtype, ids=None) -> torch.Tensor:
    """``W[row : row + rows]``, or with ``ids [rows]`` int64 those rows, NaN where there is none:
    ``[rows, k]``."""
    format = packed.format
    y = torch.empty(rows, packed.k, dtype=dtype, device=packed.codes.device)
    if not y.numel():
        return y
    levels = None
    if format.codebook == "nf":
        levels = levels_on(y.device)
    padded = format.padded_k(packed.k)
    # 16 rows of a tile lie side by side; ids are anywhere.
    block_r = 16 if ids is None else 1
    given = [y if t is None else t for t in (packed.offsets, levels, ids)]  # what is not there is not read
    rows_kernel[triton.cdiv(rows, block_r), triton.cdiv(packed.k, BLOCK_K)](
        packed.codes.view(torch.int32), packed.scales, *given, y, row, rows, packed.n, packed.k,
        padded * format.bits // 32, format.groups(packed.k), format.group or padded,
        BITS=format.bits, ZERO=ZEROS[format.bits] if format.symmetric else 0,
        LEVELS=levels is not None, OFFSETS=packed.offsets is not None, IDS=ids is not None,
        BLOCK_R=block_r, BLOCK_K=BLOCK_K, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def dequantize(codes, scales, offsets, bits, codebook, n, k, group, row, rows, dtype) -> torch.Tensor:
    """``torch.ops.memlm.dequantize``.  Raises ValueError for rows that W does not have."""
    packed = _matmul.packed_with(codes, scales, offsets, bits, codebook, n, k, group)
    if not 0 <= row <= row + rows <= n:
        raise ValueError(f"rows: got {row} to {row + rows}, W has {n}")
    return rows_of(packed, row, rows, dtype)
