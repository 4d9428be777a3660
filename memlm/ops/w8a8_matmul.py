"""``w8a8_matmul``: y = x W^T + bias over 8-bit weights and int8 activations."""

from __future__ import annotations

import torch

from memlm import formats
from memlm.formats import ACT_GROUP
from memlm.ops import _matmul

ARGUMENTS = "x x_scales codes scales n k group bias x_group norm eps swiglu residual dtype"


def _checked(given: dict) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of the result, or TypeError or ValueError naming what does not fit."""
    x, scales, group = given["x"], given["x_scales"], given["x_group"]
    packed = _matmul.packed_given(8, given)
    around = (given[name] for name in ("bias", "norm", "swiglu", "residual"))
    if group not in (0, ACT_GROUP):
        raise ValueError(f"x_group: got {group}, accepted are 0 (the whole row) and {ACT_GROUP}")
    if scales is None:
        if given["dtype"] not in (None, x.dtype):
            raise TypeError(f"dtype: got {given['dtype']}, the result has x's, {x.dtype}")
        return x.dtype, _matmul.check(x, packed, *around)
    dtype = given["dtype"] or torch.float32
    if x.dtype != torch.int8:
        raise TypeError(f"x: got {x.dtype}, expected torch.int8 beside x_scales")
    if dtype not in _matmul.X_DTYPES:
        raise TypeError(f"dtype: got {dtype}, accepted are {_matmul.X_DTYPES}")
    if given["norm"] is not None:
        raise ValueError("norm: got a tensor, but x is int8, and only numbers can be normalised")
    wanted = (*x.shape[:-1], -(-packed.k // group) if group else 1)
    if scales.dtype != torch.float32 or tuple(scales.shape) != wanted:
        raise ValueError(
            f"x_scales: got {scales.dtype} {list(scales.shape)}, expected torch.float32 {list(wanted)}"
        )
    return dtype, _matmul.check_shapes(x, dtype, packed, *around)


def _reference(given: dict) -> torch.Tensor:
    dtype, shape = _checked(given)
    x, group, packed = given["x"], given["x_group"], _matmul.packed_given(8, given)
    if given["x_scales"] is None:
        rows = _matmul.prologue(x, packed.k, given["norm"], given["eps"]).reshape(-1, packed.k)
        q, scales = _matmul.quantize_activations(rows, group)
        x, scales = q.flatten(1)[:, : packed.k], scales.squeeze(-1)
    else:
        x, scales = x.reshape(-1, packed.k), given["x_scales"].reshape(-1, given["x_scales"].shape[-1])
    if group or packed.format.group:
        spread = scales.repeat_interleave(group or packed.k, dim=1)[:, : packed.k]
        y = (x.float() * spread) @ formats.dequantize(packed).T
    else:
        q, w_scales, _ = formats.unpack(packed)
        y = (x.double() @ q.double().T).float() * (scales * w_scales.float().T)
    return _matmul.epilogue(y, given["bias"], given["swiglu"], given["residual"]).to(dtype).view(shape)


def _fake(given: dict) -> torch.Tensor:
    dtype, shape = _checked(given)
    return given["x"].new_empty(shape, dtype=dtype)


_op = _matmul.define_dense("w8a8_matmul", 8, ARGUMENTS, _reference, _fake)


def w8a8_matmul(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    n: int,
    k: int,
    group: int,
    bias: torch.Tensor | None = None,
    x_group: int = 0,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x W^T + bias`` for int8 x and a packed 8-bit ``W [n, k]``: products are exact integers,
    and where x and W have one scale per row (``x_group=0``, ``group=0``) so is the whole sum.

    x is either ``[..., k]`` in f32, bf16 or f16 (``x_scales`` None) and rounded to int8 on the way,
    one scale for the row, or for each 32 k with ``x_group=32``; or int8 codes -127..127 with
    ``x_scales [..., 1]`` or ``[..., ceil(k / 32)]`` in f32, as :func:`memlm.ops.quantize_rows`
    gives them: rounded once for several products.  The result is in x's dtype; for int8 x in
    ``dtype`` (None: f32).  k is at most 65,536.

    bias, norm (for float x), swiglu and residual are as for :func:`memlm.ops.w4_matmul`; gradients
    too, for float x: rounding it counts as the identity.

    Raises TypeError, ValueError or FormatError naming the argument that does not fit.
    """
    rest = (n, k, group, bias, x_group, norm, eps, swiglu, residual, dtype)
    try:
        return _op(x, x_scales, codes, scales, *rest)
    except Exception:
        _checked(dict(zip(ARGUMENTS.split(), (x, x_scales, codes, scales, *rest))))
        raise
