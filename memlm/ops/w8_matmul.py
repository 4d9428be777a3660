"""``w8_matmul``: y = x W^T + bias over 8-bit weights."""

from __future__ import annotations

import torch

from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define


def _packed(codes, scales, n, k, group) -> Packed:
    return _matmul.packed_of(8, codes, scales, None, n, k, group)


def _reference(x, codes, scales, n, k, group, bias, fast):
    return _matmul.reference(x, _packed(codes, scales, n, k, group), bias, fast)


def _fake(x, codes, scales, n, k, group, bias, fast):
    return _matmul.fake(x, _packed(codes, scales, n, k, group), bias)


def _setup_context(ctx, inputs, output):
    _, codes, scales, ctx.n, ctx.k, ctx.group, _, _ = inputs
    ctx.save_for_backward(codes, scales)


def _backward(ctx, grad):
    x_wanted, *_, bias_wanted, _ = ctx.needs_input_grad
    packed = _packed(*ctx.saved_tensors, ctx.n, ctx.k, ctx.group)
    grad_x = _matmul.grad_x(grad, packed) if x_wanted else None
    grad_bias = _matmul.grad_bias(grad) if bias_wanted else None
    return grad_x, None, None, None, None, None, grad_bias, None


_op = define("w8_matmul", _reference, _fake, _backward, _setup_context)
_matmul.register_autocast(_op, (0, 6))


def w8_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    n: int,
    k: int,
    group: int,
    bias: torch.Tensor | None = None,
    fast: bool = True,
) -> torch.Tensor:
    """``x W^T + bias`` for ``x [..., k]`` (f32, bf16, f16) and a packed 8-bit ``W [n, k]``;
    returns ``[..., n]`` in x's dtype.

    ``group`` is 0 (one scale per row), 32, 64 or 128; everything else is as for
    :func:`memlm.ops.w4_matmul`.
    """
    try:
        return _op(x, codes, scales, n, k, group, bias, fast)
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        _matmul.check(x, _packed(codes, scales, n, k, group), bias)
        raise
