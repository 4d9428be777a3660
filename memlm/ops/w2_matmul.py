"""``w2_matmul``: y = x W^T + bias over 2-bit weights."""

from __future__ import annotations

import torch

from memlm.ops import _matmul

ARGUMENTS = "x codes scales offsets n k group bias fast norm eps swiglu residual"  # as the schema
_op = _matmul.define_weight_only("w2_matmul", 2, ARGUMENTS)


def w2_matmul(
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
    """``x W^T + bias`` for ``x [..., k]`` (f32, bf16, f16) and a packed 2-bit ``W [n, k]``;
    returns ``[..., n]`` in x's dtype.

    ``group`` is 32, 64 or 128; the codes of ternary weights are 0, 1, 2 for -1, 0, 1; everything
    else is as for :func:`memlm.ops.w4_matmul`.
    """
    try:
        return _op(x, codes, scales, offsets, n, k, group, bias, fast, norm, eps, swiglu, residual)
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        packed = _matmul.packed_of(2, codes, scales, offsets, n, k, group)
        _matmul.check(x, packed, bias, norm, swiglu, residual)
        raise
