"""``w4_sparse_dequantize`` in Triton: rows of a W of pattern 2:4 or unstructured as floats.

A program takes a tile by BLOCK_K columns; of an unstructured matrix it first counts the bits before them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._sparse import _bytes_before, _expanded, compressed_arguments
from memlm.kernels._weight_only import _unpack
from memlm.ops.w4_sparse_dequantize import weights_of
from memlm.sparse_formats import SparseTensors

BLOCK_K = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def sparse_rows_kernel(
    codes, places, starts, scales, levels, y, first_tile, row, rows, k, tiles, fours, groups, group,
    BITMAP: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = first_tile + tl.program_id(0)
    four = tl.program_id(1) * (BLOCK_K // 4)
    before = _bytes_before(places, starts, tile.to(tl.int64) + tl.arange(0, 1), tiles, fours, four, BITMAP)
    q, _ = _expanded(codes, places, starts, before, tile, tiles, four, fours, BITMAP, LEVELS, 16, BLOCK_K)
    lane = tl.arange(0, 16)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = tile * 16 + lane - row
    inside = ((at >= 0) & (at < rows))[:, None] & (column < k)[None, :]
    place = ((tile.to(tl.int64) * groups + column // group) * 16)[None, :] + lane[:, None]
    w = _unpack(q, levels, tl.float32, 4, 8, LEVELS) * tl.load(scales + place, inside, 0.0).to(tl.float32)
    tl.store(y + at[:, None].to(tl.int64) * k + column[None, :], w.to(y.dtype.element_ty), inside)


def w4_sparse_dequantize(
    codes, places, starts, scales, pattern, codebook, n, k, group, row, rows, dtype
) -> torch.Tensor:
    """``torch.ops.memlm.w4_sparse_dequantize``.  What starts and places say is believed.

    Raises ValueError for rows that W does not have, TypeError for another dtype.
    """
    packed = weights_of(SparseTensors, codes, places, starts, scales, pattern, codebook, n, k, group)
    if not 0 <= row <= row + rows <= n:
        raise ValueError(f"rows: got {row} to {row + rows}, W has {n}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, accepted are {DTYPES}")
    y = torch.empty(rows, k, dtype=dtype, device=codes.device)
    if not rows:
        return y
    weights, sizes, constants = compressed_arguments(packed)
    first = row // 16
    grid = (row + rows - 1) // 16 - first + 1, triton.cdiv(k, BLOCK_K)
    sparse_rows_kernel[grid](
        *(y if t is None else t for t in weights), y, first, row, rows, k, *sizes,
        packed.format.values.groups(k), group, **constants, BLOCK_K=BLOCK_K, num_warps=4,
    )  # fmt: skip
    return y
