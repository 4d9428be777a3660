"""Rows of activations normalised before a product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, norm, out, k, x_stride, eps, BLOCK: tl.constexpr):
    """One row: x / sqrt(mean(x^2) + eps) * norm, in f32, rounded at the end (arXiv:1910.07467)."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + at, at < k, 0.0).to(tl.float32)
        squares += value * value
    factor = tl.rsqrt(tl.sum(squares, 0) / k + eps)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + at, at < k, 0.0).to(tl.float32)
        weight = tl.load(norm + at, at < k, 0.0).to(tl.float32)
        tl.store(out + row * k + at, (value * factor * weight).to(out.dtype.element_ty), at < k)


def rms_norm(x: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows ``x [m, k]`` normalised, ``[m, k]`` in x's dtype."""
    m, k = x.shape
    out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(k))
    rms_norm_kernel[(m,)](x, norm, out, k, x.stride(0), eps, BLOCK=block, num_warps=4)
    return out
