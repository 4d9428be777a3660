"""``w4_matmul``: y = x W^T + bias over 4-bit weights."""

from __future__ import annotations

import torch

from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define


def _packed(codes, scales, offsets, n, k, group) -> Packed:
    return _matmul.packed_of(4, codes, scales, offsets, n, k, group)


def _reference(x, codes, scales, offsets, n, k, group, bias, fast):
    return _matmul.reference(x, _packed(codes, scales, offsets, n, k, group), bias, fast)


def _fake(x, codes, scales, offsets, n, k, group, bias, fast):
    return _matmul.fake(x, _packed(codes, scales, offsets, n, k, group), bias)


def _setup_context(ctx, inputs, output):
    _, codes, scales, offsets, ctx.n, ctx.k, ctx.group, _, _ = inputs
    ctx.save_for_backward(codes, scales, offsets)


def _backward(ctx, grad):
    x_wanted, *_, bias_wanted, _ = ctx.needs_input_grad
    packed = _packed(*ctx.saved_tensors, ctx.n, ctx.k, ctx.group)
    grad_x = _matmul.grad_x(grad, packed) if x_wanted else None
    grad_bias = _matmul.grad_bias(grad) if bias_wanted else None
    return grad_x, None, None, None, None, None, None, grad_bias, None


_op = define("w4_matmul", _reference, _fake, _backward, _setup_context)
_matmul.register_autocast(_op, (0, 7))


def w4_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    bias: torch.Tensor | None = None,
    fast: bool = True,
) -> torch.Tensor:
    """``x W^T + bias`` for ``x [..., k]`` (f32, bf16, f16) and a packed 4-bit ``W [n, k]``;
    returns ``[..., n]`` in x's dtype.

    ``codes``, ``scales``, ``offsets`` are laid out as ``memlm/formats.py`` draws; ``group`` is 32,
    64 or 128; ``bias [n]`` has x's dtype.  An empty batch gives an empty result; x may have any
    strides.

    ``fast=False``: weights are dequantised in registers, products and sums are f32; the error is
    that of an f32 matmul with the dequantised weights.  ``fast=True``: x is rounded to int8 with
    one scale per 32 consecutive k, products are exact integers, sums f32; x is off by at most
    1/254 of the largest of its 32.  A row of x that holds Inf or NaN gives NaN.

    Differentiable with respect to x and bias; the packed weights are frozen.  On devices without
    a kernel the plain torch reference runs, with a warning.

    Raises TypeError, ValueError or FormatError naming the argument that does not fit.
    """
    try:
        return _op(x, codes, scales, offsets, n, k, group, bias, fast)
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        _matmul.check(x, _packed(codes, scales, offsets, n, k, group), bias)
        raise
