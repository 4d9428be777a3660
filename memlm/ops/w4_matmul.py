"""``w4_matmul``: y = x W^T + bias over 4-bit weights."""

from __future__ import annotations

import torch

from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define


def _packed(codes, scales, offsets, n, k, group) -> Packed:
    return _matmul.packed_of(4, codes, scales, offsets, n, k, group)


def _reference(x, codes, scales, offsets, n, k, group, *rest):
    bias, fast, norm, eps, swiglu, residual = rest
    packed = _packed(codes, scales, offsets, n, k, group)
    return _matmul.reference(x, packed, bias, fast, norm, eps, swiglu, residual)


def _fake(x, codes, scales, offsets, n, k, group, bias, fast, norm, eps, swiglu, residual):
    packed = _packed(codes, scales, offsets, n, k, group)
    return _matmul.fake(x, packed, bias, norm, swiglu, residual)


_FLOATS = (0, 7, 9, 12)  # x, bias, norm, residual among the arguments
_op = define(
    "w4_matmul",
    _reference,
    _fake,
    lambda ctx, grad: _matmul.backward(ctx, grad, _packed, _FLOATS),
    lambda ctx, inputs, output: _matmul.setup_context(ctx, inputs, _FLOATS),
)
_matmul.register_autocast(_op, _FLOATS)


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
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
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

    The layers around the product can be part of it, in f32 and without a pass over memory of
    their own: ``norm [k]`` with ``eps`` puts RMSNorm before it (arXiv:1910.07467); ``swiglu`` takes
    ``x [..., 2k]`` and multiplies ``silu(x[..., :k]) * x[..., k:]`` (arXiv:2002.05202);
    ``residual [..., n]`` is added to the result.

    Differentiable with respect to x, bias, norm and residual; the packed weights are frozen.  On
    devices without a kernel the plain torch reference runs, with a warning.

    Raises TypeError, ValueError or FormatError naming the argument that does not fit.
    """
    try:
        return _op(x, codes, scales, offsets, n, k, group, bias, fast, norm, eps, swiglu, residual)
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        packed = _packed(codes, scales, offsets, n, k, group)
        _matmul.check(x, packed, bias, norm, swiglu, residual)
        raise
