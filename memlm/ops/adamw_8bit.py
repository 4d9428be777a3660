"""``adamw_8bit``: a step of AdamW whose moments are stored in 8 bits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from memlm import dynamic_codes
from memlm.dynamic_codes import BLOCK
from memlm.ops._matmul import X_DTYPES
from memlm.ops._registry import define


class Factors(NamedTuple):
    """What numbers of one step are multiplied with: computed in f64, rounded to f32."""

    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float
    decay: float  # of the parameter
    size: float  # of the step
    unbias: float  # of the square root of the second moment
    eps: float


def factors(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> Factors:
    exact = (
        beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr / (1 - math.pow(beta1, step)),
        1 / math.sqrt(1 - math.pow(beta2, step)), eps,
    )  # fmt: skip
    return Factors(*torch.tensor(exact, dtype=torch.float32).tolist())


def update(param, grad, exp_avg, exp_avg_sq, f: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AdamW (arXiv:1711.05101) in f32: parameter and moments after a step, of f32 tensors; each
    operation is rounded, in this order."""
    exp_avg = exp_avg * f.beta1 + grad * f.rest1
    exp_avg_sq = exp_avg_sq * f.beta2 + grad * f.rest2 * grad
    root = exp_avg_sq.double().sqrt().float()  # torch's own f32 root may be off by an ulp
    param = param * f.decay - exp_avg / (root * f.unbias + f.eps) * f.size
    return param, exp_avg, exp_avg_sq


def check_hyperparameters(lr, beta1, beta2, eps, weight_decay) -> None:
    """Raises ValueError naming what does not fit."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value}, accepted are finite numbers from 0 on")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: got {value}, accepted is 0 to below 1")


def _check(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
    weight_decay, step,
) -> None:  # fmt: skip
    """Raises TypeError or ValueError naming the argument that does not fit."""
    if not isinstance(param, torch.Tensor) or param.dtype not in X_DTYPES:
        got = param.dtype if isinstance(param, torch.Tensor) else type(param).__name__
        raise TypeError(f"param: got {got}, accepted are tensors of {X_DTYPES}")
    blocks = [-(-param.numel() // BLOCK)]
    for name, x, dtype, shape in (
        ("grad", grad, param.dtype, param.shape),
        ("exp_avg", exp_avg, torch.uint8, param.shape),
        ("exp_avg_absmax", exp_avg_absmax, torch.float32, blocks),
        ("exp_avg_sq", exp_avg_sq, torch.uint8, param.shape),
        ("exp_avg_sq_absmax", exp_avg_sq_absmax, torch.float32, blocks),
    ):
        if not isinstance(x, torch.Tensor) or x.dtype != dtype:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name}: got {got}, expected a tensor of {dtype}")
        if list(x.shape) != list(shape) or x.device != param.device:
            raise ValueError(
                f"{name}: got shape {list(x.shape)} on {x.device}, expected {list(shape)} on {param.device}"
            )
    for name, x in (
        ("param", param), ("exp_avg", exp_avg), ("exp_avg_absmax", exp_avg_absmax),
        ("exp_avg_sq", exp_avg_sq), ("exp_avg_sq_absmax", exp_avg_sq_absmax),
    ):  # fmt: skip
        if not x.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, it is changed in place")
    check_hyperparameters(lr, beta1, beta2, eps, weight_decay)
    if step < 1:
        raise ValueError(f"step: got {step}, they count from 1")


def _reference(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
    weight_decay, step,
) -> None:  # fmt: skip
    moments = ((exp_avg, exp_avg_absmax, True), (exp_avg_sq, exp_avg_sq_absmax, False))
    _check(
        param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
        weight_decay, step,
    )  # fmt: skip
    before = [dynamic_codes.dequantize(codes.view(-1), absmax, signed) for codes, absmax, signed in moments]
    f = factors(lr, beta1, beta2, eps, weight_decay, step)
    new, *after = update(param.view(-1).float(), grad.reshape(-1).float(), *before, f)
    param.view(-1).copy_(new)
    for (codes, absmax, signed), moment in zip(moments, after):
        new_codes, new_absmax = dynamic_codes.quantize(moment, signed)
        codes.view(-1).copy_(new_codes)
        absmax.copy_(new_absmax)


def _fake(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
    weight_decay, step,
) -> None:  # fmt: skip
    _check(
        param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
        weight_decay, step,
    )  # fmt: skip


_op = define("adamw_8bit", _reference, _fake)


def adamw_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_absmax: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_sq_absmax: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """A step of AdamW (arXiv:1711.05101) with moments in 8 bits, block by block (arXiv:2110.02861), in
    place: in 2.03 bytes of state for each parameter instead of 8.

    param: f32, bf16 or f16, any shape, contiguous; ``grad`` of the same shape and dtype.
    exp_avg, exp_avg_sq: uint8, of param's shape: the codes of both moments, signed and unsigned, as
        memlm/dynamic_codes.py specifies them; ``exp_avg_absmax``, ``exp_avg_sq_absmax``: f32
        ``[ceil(param.numel() / 256)]``, the largest magnitude of each 256 consecutive numbers.  Codes of
        127 and 0 with magnitudes of 0 are moments of 0, to begin with.
    step: of this parameter, from 1 on.

    The step itself is f32, with the new moments before they are rounded; param is rounded once, to
    nearest.  All kernels compute the same bits.  A block with NaN or Inf among its moments (an f32 square
    that overflows is one) has magnitude NaN: from the next step on all its parameters are NaN.

    Raises TypeError or ValueError naming the argument that does not fit; nothing is written then.
    """
    args = (
        param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
        weight_decay, step,
    )  # fmt: skip
    try:
        _op(*args)
    except Exception:
        _check(*args)
        raise
