"""``w4_sparse_matmul`` in Triton: what is stored is put where it belongs in registers, with the code of zero in
between, and multiplied as _weight_only.py does.  (Triton has no sparse matrix instructions.)

Where the codes of 16 rows x 4 k begin, in an unstructured matrix, follows from the bits before them: a program
counts those of each step as it goes, and first those before its share of k.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from memlm.kernels import _unpacked
from memlm.kernels._sparse import _bytes_before, _expanded, compressed_arguments
from memlm.kernels._weight_only import _add_product, _finish, _store_share, _unpack, product, pruned, target_of
from memlm.kernels.w4_sparse_dequantize import w4_sparse_dequantize
from memlm.ops.w4_sparse_dequantize import weights_of
from memlm.sparse_formats import SparseTensors


@triton.jit
def _tile_sums(
    x_row, rows_inside, first_tile, split, codes, places, starts, scales, levels, n, k, tiles, fours, groups,
    group_steps, BITMAP: tl.constexpr, LEVELS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x W[16 first_tile..]^T over a share of k, 32 at a time."""
    steps = fours // 8
    share = tl.cdiv(steps, SPLITS)
    column = first_tile * 16 + tl.arange(0, BLOCK_N)
    scale_at = (column // 16).to(tl.int64) * groups * 16 + column % 16
    tile = first_tile.to(tl.int64) + tl.arange(0, BLOCK_N // 16)
    before = _bytes_before(places, starts, tile, tiles, fours, split * share * 8, BITMAP)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        in_k = step * 32 + tl.arange(0, 32)
        x_tile = tl.load(x_row + in_k[None, :], rows_inside[:, None] & (in_k < k)[None, :], 0.0)
        q, before = _expanded(codes, places, starts, before, first_tile, tiles, step * 8, fours,
                              BITMAP, LEVELS, BLOCK_N, 32)  # fmt: skip
        w = tl.trans(_unpack(q, levels, x_tile.dtype, 4, 8, LEVELS))
        place = scale_at + step // group_steps * 16
        sums = _add_product(sums, x_tile, w, scales, scales, place, column < n, False)
    return sums


@triton.jit
def w4_sparse_kernel(
    x, codes, places, starts, scales, levels, bias, residual, y, partial,
    m, n, k, x_stride, tiles, fours, groups, group_steps, rows_about,
    BITMAP: tl.constexpr, LEVELS: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # the grid's one dimension without limit
    tile = tl.program_id(1) * (BLOCK_N // 16)
    column = tile * 16 + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    x_row = x + at[:, None].to(tl.int64) * x_stride
    sums = _tile_sums(x_row, at < m, tile, split, codes, places, starts, scales, levels, n, k, tiles, fours,
                      groups, group_steps, BITMAP, LEVELS, SPLITS, BLOCK_M, BLOCK_N)  # fmt: skip
    up = sums
    if SWIGLU:  # after the gate: registers are what there is least of
        up = _tile_sums(x_row, at < m, tile + n // 32, split, codes, places, starts, scales, levels, n, k, tiles,
                        fours, groups, group_steps, BITMAP, LEVELS, SPLITS, BLOCK_M, BLOCK_N)  # fmt: skip
    if SPLITS == 1:
        _finish(sums, up, at, column, bias, residual, y, m, n, BIAS, SWIGLU, RESIDUAL)
    else:
        _store_share(sums, up, split, at, column, partial, m, n, SWIGLU)


# As for dense weights, but that putting codes where they belong takes time: where there are many rows a program
# has many of them, and few features.  Two warps load 16 bytes of x at a time where there are 16 rows.
SPACE = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "SPLITS": splits}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages, splits in (
        (16, 32, 2, 4, 1), (16, 64, 2, 4, 1), (16, 64, 2, 4, 8), (32, 32, 4, 4, 1), (32, 64, 4, 4, 4),
        (64, 64, 4, 3, 1), (128, 64, 8, 3, 1),
    )
]  # fmt: skip


def _prune(_, named, **constants):
    # With swiglu, too, there is one product at a time.
    return pruned(target_of(named["x"].device), named["m"], 32, 4, False, SPACE)


tuned_kernel = triton.autotune(
    SPACE, key=["rows_about", "n", "k", "BITMAP", "LEVELS", "SWIGLU"],
    prune_configs_by={"early_config_prune": _prune},
)(w4_sparse_kernel)


def w4_sparse_matmul(
    x, codes, places, starts, scales, pattern, codebook, n, k, group, bias, fast, norm, eps, swiglu, residual,
    config: triton.Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """``torch.ops.memlm.w4_sparse_matmul``; ``fast`` makes no difference.  What starts and places say is
    believed: to look, the host would have to wait for the device.

    ``config``: this one of the kernel's instead of the one that is found fastest; else many rows are torch's.

    Raises UnsupportedError for an f32 x.
    """
    packed = weights_of(SparseTensors, codes, places, starts, scales, pattern, codebook, n, k, group)
    if config is None and _unpacked.are_many(x, packed):
        unpack = partial(w4_sparse_dequantize, codes, places, starts, scales, pattern, codebook, n, k, group)
        return _unpacked.product(x, packed, bias, norm, eps, swiglu, residual, unpack)
    weights, sizes, constants = compressed_arguments(packed)
    return product(
        x, packed, bias, norm, eps, swiglu, residual, config, w4_sparse_kernel, tuned_kernel, weights,
        (*sizes, packed.format.values.groups(k), group // 32), constants,
    )  # fmt: skip
