"""``w4_sparse_matmul`` in Triton: what is stored is put where it belongs in registers, with the code of zero in
between, and multiplied as _weight_only.py does.  (Triton has no sparse matrix instructions.)

Where the codes of 16 rows x 4 k begin, in an unstructured matrix, follows from the bits before them: a program
counts those of each step as it goes, and first those before its share of k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._sparse import _bytes_before, _expanded, compressed_arguments
from memlm.kernels._weight_only import SPACE, _add_product, _finish, _store_share, _unpack, product, pruned, target_of
from memlm.ops.w4_sparse_dequantize import weights_of
from memlm.sparse_formats import SparseTensors


@triton.jit
def _add_step(
    sums, x_tile, first_tile, before, step, codes, places, starts, scales, levels, n, tiles, fours, groups,
    group_steps, BITMAP: tl.constexpr, LEVELS: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """sums + x_tile W[16 first_tile.., STEP k]^T, and the bytes before the next step."""
    q, before = _expanded(codes, places, starts, before, first_tile, tiles, step * (STEP // 4), fours,
                          BITMAP, LEVELS, BLOCK_N, STEP)  # fmt: skip
    w = _unpack(q, levels, x_tile.dtype, 4, 8, LEVELS)
    column = first_tile * 16 + tl.arange(0, BLOCK_N)
    place = ((column // 16).to(tl.int64) * groups + step // group_steps) * 16 + column % 16
    return _add_product(sums, x_tile, tl.trans(w), scales, scales, place, column < n, False), before


@triton.jit
def w4_sparse_kernel(
    x, codes, places, starts, scales, levels, bias, residual, y, partial,
    m, n, k, x_stride, tiles, fours, groups, group_steps, steps, rows_about,
    BITMAP: tl.constexpr, LEVELS: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # the grid's one dimension without limit
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    share = tl.cdiv(steps, SPLITS)
    x_row = x + at[:, None].to(tl.int64) * x_stride
    tile = tl.program_id(1) * (BLOCK_N // 16)
    up_tile = tile + n // 32
    tile_at = tile.to(tl.int64) + tl.arange(0, BLOCK_N // 16)
    end = split * share * (STEP // 4)
    before = _bytes_before(places, starts, tile_at, tiles, fours, end, BITMAP)
    up_before = before
    if SWIGLU:
        up_before = _bytes_before(places, starts, tile_at + n // 32, tiles, fours, end, BITMAP)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        in_k = step * STEP + tl.arange(0, STEP)
        x_tile = tl.load(x_row + in_k[None, :], (at < m)[:, None] & (in_k < k)[None, :], 0.0)
        sums, before = _add_step(sums, x_tile, tile, before, step, codes, places, starts, scales, levels, n,
                                 tiles, fours, groups, group_steps, BITMAP, LEVELS, BLOCK_N, STEP)  # fmt: skip
        if SWIGLU:
            up, up_before = _add_step(up, x_tile, up_tile, up_before, step, codes, places, starts, scales,
                                      levels, n, tiles, fours, groups, group_steps, BITMAP, LEVELS, BLOCK_N, STEP)  # fmt: skip
    if SPLITS == 1:
        _finish(sums, up, at, column, bias, residual, y, m, n, BIAS, SWIGLU, RESIDUAL)
    else:
        _store_share(sums, up, split, at, column, partial, m, n, SWIGLU)


def _prune(_, named, **constants):
    return pruned(target_of(named["x"].device), named["m"], constants["STEP"], 4, constants["SWIGLU"])


tuned_kernel = triton.autotune(
    SPACE, key=["rows_about", "n", "k", "BITMAP", "LEVELS", "STEP", "SWIGLU"],
    prune_configs_by={"early_config_prune": _prune},
)(w4_sparse_kernel)


def w4_sparse_matmul(
    x, codes, places, starts, scales, pattern, codebook, n, k, group, bias, fast, norm, eps, swiglu, residual,
    config: triton.Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """``torch.ops.memlm.w4_sparse_matmul``; ``fast`` makes no difference.  What starts and places say is
    believed: to look, the host would have to wait for the device.

    ``config``: this one instead of the one that is found fastest.

    Raises UnsupportedError for an f32 x.
    """
    packed = weights_of(SparseTensors, codes, places, starts, scales, pattern, codebook, n, k, group)
    step = 32 if group == 32 else 64
    weights, sizes, constants = compressed_arguments(packed)
    return product(
        x, packed, bias, norm, eps, swiglu, residual, config, w4_sparse_kernel, tuned_kernel, weights,
        (*sizes, packed.format.values.groups(k), group // step, packed.format.padded_k(k) // step),
        {**constants, "STEP": step},
    )  # fmt: skip
