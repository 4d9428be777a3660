"""``quantize_rows``: activations to int8, once for several products."""

from __future__ import annotations

import torch

from memlm.formats import ACT_GROUP
from memlm.ops import _matmul
from memlm.ops._registry import define


def _check(x, x_group, norm) -> int:
    """Scales per row, or TypeError or ValueError naming what does not fit."""
    if not isinstance(x, torch.Tensor) or x.dtype not in _matmul.X_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, accepted are tensors of {_matmul.X_DTYPES}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., k] with k at least 1")
    if x_group not in (0, ACT_GROUP):
        raise ValueError(f"x_group: got {x_group}, accepted are 0 (the whole row) and {ACT_GROUP}")
    if norm is not None and (norm.dtype != x.dtype or tuple(norm.shape) != (x.shape[-1],)):
        raise ValueError(
            f"norm: got {norm.dtype} {list(norm.shape)}, expected {x.dtype} {[x.shape[-1]]}"
        )
    return -(-x.shape[-1] // ACT_GROUP) if x_group else 1


def _reference(x, x_group, norm, eps):
    groups, k = _check(x, x_group, norm), x.shape[-1]
    rows = _matmul.prologue(x, k, norm, eps).reshape(-1, k)
    q, scales = _matmul.quantize_activations(rows, x_group)
    codes = q.flatten(1)[:, :k].to(torch.int8)
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], groups)


def _fake(x, x_group, norm, eps):
    groups = _check(x, x_group, norm)
    shape = (*x.shape[:-1], groups)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


_op = define("quantize_rows", _reference, _fake)


def quantize_rows(
    x: torch.Tensor, x_group: int = 0, norm: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [..., k]`` (f32, bf16, f16) -> int8 codes ``[..., k]``, -127..127, and f32 scales
    ``[..., 1]``, or with ``x_group=32`` one for each 32 k, ``[..., ceil(k / 32)]``.

    The scale is the largest magnitude over 127; codes are rounded to nearest.  ``norm [k]`` with
    ``eps`` puts RMSNorm before it.  A span that holds Inf or NaN has scale NaN.  No gradient.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    try:
        return _op(x, x_group, norm, eps)
    except Exception:
        _check(x, x_group, norm)
        raise
