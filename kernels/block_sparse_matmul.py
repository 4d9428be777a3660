"""``block_sparse_matmul`` in Triton.

A program computes BLOCK_M rows of x by a tile of W, 16 features, whose blocks it goes through: of x it loads
the 32 k of each.  Programs of the same rows of x follow each other, so that what they load of it comes from
the cache.  With swiglu it goes through the tile of the gate, then through that of the other projection.

Codes are multiplied as in _weight_only.py.  Weights that are floats are cut into bf16 whose sum they are,
3 for f32, and x, if it is f16, into 2: the parts' products are exact, and summed in f32, from the smallest
on.  (Parts below 2^-133 are lost.)  GPUs without bf16 (sm_75) multiply them in f32.

Where there are few programs, SPLITS of them share out a tile's blocks, and a second kernel adds their sums
in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels import UnsupportedError
from memlm.kernels._sparse import _block, block_arguments
from memlm.kernels._weight_only import _add_product, _finish, _store_share, is_turing, product, pruned, target_of
from memlm.ops.block_sparse_matmul import _weights
from memlm.sparse_formats import SparseTensors

MOST_TILES = 65535  # what the second dimension of a grid may have


@triton.jit
def _product_of_floats(x_tile, w, CUT: tl.constexpr):
    """x_tile w in f32, of an x in 16 bits and a w in bf16 or f32."""
    if CUT:
        TWO: tl.constexpr = x_tile.dtype == tl.float16
        high = x_tile.to(tl.bfloat16)
        low = (x_tile.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        first = w.to(tl.bfloat16)
        sums = tl.zeros([x_tile.shape[0], w.shape[1]], tl.float32)
        if w.dtype == tl.float32:
            rest = w - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            if TWO:
                sums = tl.dot(low, third, sums)
            sums = tl.dot(high, third, sums)
            if TWO:
                sums = tl.dot(low, second, sums)
            sums = tl.dot(high, second, sums)
        if TWO:
            sums = tl.dot(low, first, sums)
        sums = tl.dot(high, first, sums)
    else:
        sums = tl.dot(x_tile.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    return sums


@triton.jit
def _tile_sums(
    x_row, rows_inside, k, tile, starts, places, codes, scales, offsets, levels, split,
    BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, OFFSETS: tl.constexpr, CUT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """x W[tile]^T over a share of the tile's blocks."""
    begin = tl.load(starts + tile)
    count = (tl.load(starts + tile + 1) - begin).to(tl.int32)
    share = tl.cdiv(count, SPLITS)
    places += begin
    row = tl.arange(0, 16)
    if BITS >= 16:
        codes += begin * 512
    else:
        codes += begin * (16 * BITS)
        scales += begin * 16
        if OFFSETS:
            offsets += begin * 16
    sums = tl.zeros([BLOCK_M, 16], tl.float32)
    for block in range(split * share, tl.minimum((split + 1) * share, count)):
        in_k = tl.load(places + block) * 32 + tl.arange(0, 32)
        x_tile = tl.load(x_row + in_k[None, :], rows_inside[:, None] & (in_k < k)[None, :], 0.0)
        w = _block(codes, levels, block, x_tile.dtype, BITS, ZERO, LEVELS)
        if BITS >= 16:
            sums += _product_of_floats(x_tile, w, CUT)
        else:
            sums = _add_product(sums, x_tile, w, scales, offsets, block * 16 + row, row < 16, OFFSETS)
    return sums


@triton.jit
def block_sparse_kernel(
    x, starts, places, codes, scales, offsets, levels, bias, residual, y, partial,
    m, n, k, x_stride, blocks_about, rows_about,
    BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, OFFSETS: tl.constexpr, CUT: tl.constexpr,
    BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    tile = program % tl.num_programs(1)
    at = program // tl.num_programs(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    x_row = x + at[:, None].to(tl.int64) * x_stride
    sums = _tile_sums(x_row, at < m, k, tile, starts, places, codes, scales, offsets, levels, split,
                      BITS, ZERO, LEVELS, OFFSETS, CUT, SPLITS, BLOCK_M)  # fmt: skip
    up = sums
    if SWIGLU:
        up = _tile_sums(x_row, at < m, k, tile + n // 32, starts, places, codes, scales, offsets, levels,
                        split, BITS, ZERO, LEVELS, OFFSETS, CUT, SPLITS, BLOCK_M)  # fmt: skip
    if SPLITS == 1:
        _finish(sums, up, at, column, bias, residual, y, m, n, BIAS, SWIGLU, RESIDUAL)
    else:
        _store_share(sums, up, split, at, column, partial, m, n, SWIGLU)


# A tile has 16 features, whatever the rows are.  Few rows want small programs, of which a multiprocessor has
# many, each with some blocks on their way, as nothing but bytes takes time (more than 4 stages would be more than
# RDNA has registers for); many rows want W read and unpacked seldom.
SPACE = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": 16, "SPLITS": splits}, num_warps=warps, num_stages=stages)
    for m, warps, stages, splits in (
        (16, 1, 4, 1), (16, 1, 4, 8), (32, 2, 4, 1), (32, 2, 4, 4), (64, 4, 4, 1), (128, 4, 3, 1),
    )
]  # fmt: skip


def _prune(_, named, **constants):
    # With swiglu, too, there is one tile at a time.
    return pruned(target_of(named["x"].device), named["m"], 32, constants["BITS"], False, SPACE)


tuned_kernel = triton.autotune(
    SPACE, key=["rows_about", "blocks_about", "n", "k", "BITS", "LEVELS", "OFFSETS", "SWIGLU"],
    prune_configs_by={"early_config_prune": _prune},
)(block_sparse_kernel)


def block_sparse_matmul(
    x, starts, places, codes, scales, offsets, bits, codebook, n, k, bias, fast, norm, eps, swiglu, residual,
    config: triton.Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """``torch.ops.memlm.block_sparse_matmul``; ``fast`` makes no difference.  What starts and places say
    is believed: to look, the host would have to wait for the device.

    ``config``: this one instead of the one that is found fastest.

    Raises UnsupportedError for an f32 x, and for more than 16 MOST_TILES rows of W.
    """
    packed = _weights(SparseTensors, starts, places, codes, scales, offsets, bits, codebook, n, k)
    if packed.tiles > MOST_TILES:
        raise UnsupportedError(f"n: got {n}, Triton's kernel takes {16 * MOST_TILES} at most")
    weights, constants = block_arguments(packed)
    return product(
        x, packed, bias, norm, eps, swiglu, residual, config, block_sparse_kernel, tuned_kernel,
        (starts, places, *weights), (triton.next_power_of_2(len(places)),),
        {**constants, "CUT": not is_turing(codes.device)},
    )  # fmt: skip
