"""``w8_matmul``: y = x W^T + bias over 8-bit weights."""

from __future__ import annotations

import torch

from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define


def _packed(codes, scales, n, k, group) -> Packed:
    return _matmul.packed_of(8, codes, scales, None, n, k, group)


def _reference(
    x, codes, scales, n, k, group, bias, fast, norm, eps, swiglu, residual
):
    packed = _packed(codes, scales, n, k, group)
    return _matmul.reference(x, packed, bias, fast, norm, eps, swiglu, residual)


def _fake(x, codes, scales, n, k, group, bias, fast, norm, eps, swiglu, residual):
    packed = _packed(codes, scales, n, k, group)
    return _matmul.fake(x, packed, bias, norm, swiglu, residual)


def _setup_context(ctx, inputs, output):
    x, codes, scales, n, k, group, _, _, norm, ctx.eps, ctx.swiglu, _ = inputs
    ctx.n, ctx.k, ctx.group = n, k, group
    x = x if norm is not None or ctx.swiglu else None  # the product's gradient needs no x
    ctx.save_for_backward(x, norm, codes, scales)


def _backward(ctx, grad):
    x, norm, *parts = ctx.saved_tensors
    packed = _packed(*parts, ctx.n, ctx.k, ctx.group)
    wanted = [ctx.needs_input_grad[i] for i in _FLOATS]
    grads = [None] * len(ctx.needs_input_grad)
    for i, value in zip(_FLOATS, _matmul.backward(ctx, grad, packed, x, norm, wanted)):
        grads[i] = value
    return tuple(grads)


_FLOATS = (0, 6, 8, 11)  # x, bias, norm, residual among the arguments
_op = define("w8_matmul", _reference, _fake, _backward, _setup_context)
_matmul.register_autocast(_op, _FLOATS)


def w8_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
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
    """``x W^T + bias`` for ``x [..., k]`` (f32, bf16, f16) and a packed 8-bit ``W [n, k]``;
    returns ``[..., n]`` in x's dtype.

    ``group`` is 0 (one scale per row), 32, 64 or 128; everything else is as for
    :func:`memlm.ops.w4_matmul`.
    """
    try:
        return _op(
            x, codes, scales, n, k, group, bias, fast, norm, eps, swiglu, residual
        )
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        packed = _packed(codes, scales, n, k, group)
        _matmul.check(x, packed, bias, norm, swiglu, residual)
        raise
