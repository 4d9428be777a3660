"""``w8a8_matmul`` in Triton: int8 by int8, over canonical 8-bit weights.

The products of STEP k are exact integers.  Where x and W have one scale for a row, integers are summed to
the end and multiplied by both scales once; else each step's sum is multiplied by its scales and added in f32.
Float x is rounded first, by kernels/quantize_rows.py.

GPUs without int8 matrix instructions in Triton (sm_75) multiply the codes as f16: below 2^7 each, 64
products stay below 2^24, which f32 sums hold exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._weight_only import (
    SPACE, SUM_TILE, _finish, _store_share, about, in_best, is_turing, pruned, target_of, tiles_of_sums,
)  # fmt: skip
from memlm.kernels.quantize_rows import quantize_rows
from memlm.ops import _matmul
from memlm.ops.w8a8_matmul import ARGUMENTS, _checked

MOST_K = 1 << 16  # 2^16 products of 2^14 are sums of 2^30


@triton.jit
def _add_step(
    sums, x_tile, x_scales, x_scale_at, rows_inside, column, step, words, scales,
    n, blocks, groups, group_steps, x_group_steps,
    WHOLE: tl.constexpr, INTEGERS: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """sums + x_tile W[column, STEP k]^T"""
    tile, row = (column // 16).to(tl.int64), column % 16
    block = step * (STEP // 4) + tl.arange(0, STEP // 4)
    inside = (column < n)[:, None] & (block < blocks)[None, :]
    word = tl.load(words + ((tile * blocks)[:, None] + block[None, :]) * 16 + row[:, None], inside, 0)
    w = tl.reshape((word[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]).to(tl.int8), [BLOCK_N, STEP])
    if INTEGERS:
        product = tl.dot(x_tile, tl.trans(w), out_dtype=tl.int32)
    else:
        product = tl.dot(x_tile.to(tl.float16), tl.trans(w.to(tl.float16))).to(tl.int32)
    if WHOLE:
        sums += product
    else:
        scale_at = (tile * groups + step // group_steps) * 16 + row
        scale = tl.load(scales + scale_at, column < n, 0.0).to(tl.float32)
        x_scale = tl.load(x_scales + x_scale_at + step // x_group_steps, rows_inside, 0.0)
        sums += product.to(tl.float32) * (x_scale[:, None] * scale[None, :])
    return sums


@triton.jit
def _scaled(sums, x_scales, at, m, scales, column, n):
    """Whole sums as numbers.  W has one group: its scales lie as its rows do."""
    scale = tl.load(scales + column, column < n, 0.0).to(tl.float32)
    x_scale = tl.load(x_scales + at, at < m, 0.0)
    return sums.to(tl.float32) * (x_scale[:, None] * scale[None, :])


@triton.jit
def w8a8_kernel(
    x, x_scales, words, scales, bias, residual, y, partial,
    m, n, k, x_stride, blocks, groups, x_groups, group_steps, x_group_steps, steps,
    rows_about, WHOLE: tl.constexpr, INTEGERS: tl.constexpr,
    BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # the grid's one dimension without limit
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    share = tl.cdiv(steps, SPLITS)
    x_row = x + at[:, None].to(tl.int64) * x_stride
    x_scale_at = at.to(tl.int64) * x_groups
    SUMS: tl.constexpr = tl.int32 if WHOLE else tl.float32
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    up = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        in_k = step * STEP + tl.arange(0, STEP)
        x_tile = tl.load(x_row + in_k[None, :], (at < m)[:, None] & (in_k < k)[None, :], 0)
        sums = _add_step(sums, x_tile, x_scales, x_scale_at, at < m, column, step, words, scales, n, blocks,
                         groups, group_steps, x_group_steps, WHOLE, INTEGERS, BLOCK_N, STEP)  # fmt: skip
        if SWIGLU:
            up = _add_step(up, x_tile, x_scales, x_scale_at, at < m, column + n // 2, step, words, scales, n,
                           blocks, groups, group_steps, x_group_steps, WHOLE, INTEGERS, BLOCK_N, STEP)  # fmt: skip
    if SPLITS == 1:
        if WHOLE:
            sums = _scaled(sums, x_scales, at, m, scales, column, n)
            up = _scaled(up, x_scales, at, m, scales, column + n // 2, n)
        _finish(sums, up, at, column, bias, residual, y, m, n, BIAS, SWIGLU, RESIDUAL)
    else:
        _store_share(sums, up, split, at, column, partial, m, n, SWIGLU)


@triton.jit
def add_splits_kernel(
    partial, x_scales, scales, bias, residual, y, m, n,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (at < m)[:, None] & (column < (n // 2 if SWIGLU else n))[None, :]
    SUMS: tl.constexpr = tl.int32 if WHOLE else tl.float32
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    up = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    for split in range(SPLITS):
        place = (split * m + at)[:, None].to(tl.int64) * n + column[None, :]
        sums += tl.load(partial + place, inside, 0)
        if SWIGLU:
            up += tl.load(partial + place + n // 2, inside, 0)
    if WHOLE:
        sums = _scaled(sums, x_scales, at, m, scales, column, n)
        up = _scaled(up, x_scales, at, m, scales, column + n // 2, n)
    _finish(sums, up, at, column, bias, residual, y, m, n, BIAS, SWIGLU, RESIDUAL)


def step_of(group: int, x_group: int, integers: bool) -> int:
    """STEP: within one group of both sides; 64 products without int8 instructions need a stack."""
    return 32 if 32 in (group, x_group) or not integers else 64


def _prune(_, named, **constants):
    target = target_of(named["x"].device)
    return pruned(target, named["m"], constants["STEP"], 8, constants["SWIGLU"])


tuned_kernel = triton.autotune(
    SPACE, key=["rows_about", "n", "k", "STEP", "WHOLE", "SWIGLU"],
    prune_configs_by={"early_config_prune": _prune},
)(w8a8_kernel)


def w8a8_matmul(
    x, x_scales, codes, scales, n, k, group, bias, x_group, norm, eps, swiglu, residual, dtype,
    config: triton.Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """``torch.ops.memlm.w8a8_matmul``.  ``config``: this one instead of the one that is found fastest.

    Raises ValueError for k beyond 65,536.
    """
    values = (x, x_scales, codes, scales, n, k, group, bias, x_group, norm, eps, swiglu, residual, dtype)
    dtype, shape = _checked(dict(zip(ARGUMENTS.split(), values)))
    if k > MOST_K:
        raise ValueError(f"k: got {k}, accepted are at most {MOST_K}")
    packed = _matmul.packed_of(8, codes, scales, None, n, k, group)
    y = torch.empty(x.numel() // k, shape[-1], dtype=dtype, device=x.device)
    if not len(y):
        return y.view(shape)
    if x_scales is None:
        x, x_scales = quantize_rows(x, x_group, norm, eps)
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    x_groups = x_scales.shape[-1]
    x_scales = x_scales.reshape(-1, x_groups).contiguous()
    integers = not is_turing(x.device)
    step = step_of(group, x_group, integers)
    padded = packed.format.padded_k(k)
    steps, m = triton.cdiv(padded, step), len(rows)
    residual = None if residual is None else residual.reshape(y.shape).contiguous()
    flags = {"BIAS": bias is not None, "SWIGLU": swiglu, "RESIDUAL": residual is not None}
    flags["WHOLE"] = whole = not (group or x_group)
    given = [y if t is None else t for t in (bias, residual)]  # what is not there is not read

    def run(chosen, splits: int, **settings):
        """The product with at most so many splits."""
        kind = torch.int32 if whole else torch.float32
        partial = torch.empty(splits, m, n, dtype=kind, device=x.device) if splits > 1 else y
        chosen(
            rows, x_scales, codes.view(torch.int32), scales, *given, y, partial,
            m, n, k, rows.stride(0), padded // 4, packed.format.groups(k), x_groups,
            group // step or steps, x_group // step or steps, steps, about(m),
            INTEGERS=integers, STEP=step, **flags, **settings,
        )  # fmt: skip
        return partial

    partial, splits = in_best(run, w8a8_kernel, tuned_kernel, config, m, y.shape[1])
    if splits > 1:
        add_splits_kernel[tiles_of_sums(m, y.shape[1])](
            partial, x_scales, scales, *given, y, m, n, SPLITS=splits, **SUM_TILE, **flags
        )
    return y.view(shape)
