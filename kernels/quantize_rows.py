"""``quantize_rows`` in Triton: RMSNorm and rounding to int8 in one kernel, a program for each row.

The specification is memlm/ops/_matmul.py, ``quantize_activations``, to the last bit: divisions are rounded
to nearest, and ``x * (127 / amax)`` is rounded before it is rounded to an integer, so not fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.ops.quantize_rows import _check

ROUNDER = tl.constexpr(1.5 * 2**23)  # what is added to it has no digits below 1: nearest, ties to even


@triton.jit
def _load(x, norm, factor, at, k, NORM: tl.constexpr):
    h = tl.load(x + at, at < k, 0.0).to(tl.float32)
    if NORM:
        h = h * factor * tl.load(norm + at, at < k, 0.0).to(tl.float32)
    return h


@triton.jit
def _magnitude(h):
    """NaN counts as Inf, which a maximum cannot lose."""
    size = tl.abs(h)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def _scale(amax):
    """Scale, and what numbers are multiplied by: 0 where the codes are."""
    inverse = tl.div_rn(tl.full(amax.shape, 127.0, tl.float32), amax)
    usable = (inverse < float("inf")) & (amax < float("inf"))
    scale = tl.where(usable, tl.div_rn(amax, tl.full(amax.shape, 127.0, tl.float32)), 0.0)
    return tl.where(amax < float("inf"), scale, float("nan")), tl.where(usable, inverse, 0.0)


@triton.jit
def _codes(h, inverse):
    scaled = tl.where(inverse > 0, h * inverse, 0.0)
    return (scaled + ROUNDER - ROUNDER).to(tl.int8)


@triton.jit
def quantize_rows_kernel(
    x, norm, codes, scales, k, groups, x_stride, eps,
    NORM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x, codes, scales = x + row * x_stride, codes + row * k, scales + row * groups
    factor = 1.0
    if NORM:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, k, BLOCK):
            h = _load(x, norm, 1.0, start + tl.arange(0, BLOCK), k, False)
            squares += h * h
        factor = tl.rsqrt(tl.sum(squares, 0) / k + eps)
    if GROUP == 0:
        largest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, k, BLOCK):
            largest = tl.maximum(largest, _magnitude(_load(x, norm, factor, start + tl.arange(0, BLOCK), k, NORM)))
        scale, inverse = _scale(tl.max(tl.reshape(largest, [1, BLOCK]), 1))
        tl.store(scales + tl.arange(0, 1), scale)
        for start in range(0, k, BLOCK):
            at = start + tl.arange(0, BLOCK)
            h = tl.reshape(_load(x, norm, factor, at, k, NORM), [1, BLOCK])
            tl.store(codes + at[None, :], _codes(h, inverse[:, None]), (at < k)[None, :])
    else:
        for start in range(0, k, BLOCK):
            group = start // GROUP + tl.arange(0, BLOCK // GROUP)
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            h = _load(x, norm, factor, at, k, NORM)
            scale, inverse = _scale(tl.max(_magnitude(h), 1))
            tl.store(scales + group, scale, group < groups)
            tl.store(codes + at, _codes(h, inverse[:, None]), at < k)


def quantize_rows(x, x_group, norm, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.ops.memlm.quantize_rows``, of f32, f16 and bf16."""
    groups, k = _check(x, x_group, norm), x.shape[-1]
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(rows), groups, dtype=torch.float32, device=x.device)
    if len(rows):
        block = max(32, min(1024, triton.next_power_of_2(k)))
        quantize_rows_kernel[(len(rows),)](
            rows, rows if norm is None else norm, codes, scales, k, groups, rows.stride(0), eps,
            NORM=norm is not None, GROUP=x_group, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes.view(x.shape), scales.view(*x.shape[:-1], groups)
