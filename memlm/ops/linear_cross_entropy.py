"""``linear_cross_entropy``: a linear layer's cross entropy without its logits."""

from __future__ import annotations

import torch

from memlm.ops._matmul import X_DTYPES, register_autocast
from memlm.ops._registry import define

REDUCTIONS = ("none", "mean", "sum")
ROWS, COLUMNS = 2048, 4096  # of logits that are there at once: 32 MB in f32


def _check(hidden, weight, bias, targets, label_smoothing) -> None:
    """Raises TypeError or ValueError naming the argument of the op that does not fit."""
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            raise TypeError(
                f"{name}: got {x.dtype} on {x.device}, expected {hidden.dtype} on {hidden.device}, as hidden"
            )
    if hidden.dim() != 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, expected [m, k]")
    (m, k), v = hidden.shape, weight.shape[0]
    if weight.dim() != 2 or weight.shape[1] != k or v < 1:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [v, {k}] with v at least 1")
    if bias is not None and list(bias.shape) != [v]:
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected {[v]}")
    if targets.dtype != torch.int64 or targets.device != hidden.device:
        raise TypeError(
            f"targets: got {targets.dtype} on {targets.device}, expected torch.int64 on {hidden.device}"
        )
    if list(targets.shape) != [m]:
        raise ValueError(f"targets: got shape {list(targets.shape)}, expected {[m]}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, accepted is 0 to 1")


def _sum_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _logits(hidden, weight, bias, columns: slice) -> torch.Tensor:
    """Of some columns, in f32 (f64)."""
    w = weight[columns].to(hidden.dtype)
    return torch.addmm(bias[columns].to(hidden.dtype), hidden, w.T) if bias is not None else hidden @ w.T


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _here(targets, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target is one of the columns, as 0 or 1, and which of them; 0 for others."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, (targets - columns.start).where(inside, 0)


def _reference(hidden, weight, bias, targets, ignore_index, label_smoothing):
    """Rows and columns in blocks, with a running maximum and sum of exponentials."""
    _check(hidden, weight, bias, targets, label_smoothing)
    m, v, dtype = len(hidden), len(weight), _sum_dtype(hidden)
    losses, lse = hidden.new_empty(m, dtype=dtype), hidden.new_empty(m, dtype=dtype)
    for rows in _blocks(m, ROWS):
        h, of = hidden[rows].to(dtype), targets[rows]
        most = h.new_full((len(h),), -torch.inf)
        total, logit, mean = (torch.zeros_like(most) for _ in range(3))
        for columns in _blocks(v, COLUMNS):
            z = _logits(h, weight, bias, columns)
            inside, place = _here(of, columns)
            logit += z.gather(1, place[:, None])[:, 0].where(inside, 0)
            if label_smoothing:
                mean += z.sum(1) / v
            now = torch.maximum(most, z.amax(1))
            base = now.masked_fill(now == -torch.inf, 0)
            total = total * (most - base).exp() + z.sub_(base[:, None]).exp_().sum(1)
            most = now
        lse[rows] = most + total.log()
        loss = lse[rows] - (1 - label_smoothing) * logit
        if label_smoothing:
            loss = loss - label_smoothing * mean
        used = of != ignore_index
        loss = loss.where(~used | ((of >= 0) & (of < v)), torch.nan)  # there is no such target
        losses[rows] = loss.where(used, 0)
    return losses, lse


def _backward_reference(
    grad, hidden, weight, bias, targets, lse, ignore_index, label_smoothing,
    want_hidden, want_weight, want_bias,
):  # fmt: skip
    """The logits of each block again, and the products of what becomes of them."""
    _check(hidden, weight, bias, targets, label_smoothing)
    m, v, dtype = len(hidden), len(weight), _sum_dtype(hidden)
    grad = grad.to(dtype).where(targets != ignore_index, 0)
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if want_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight) if want_weight else hidden.new_empty(0)
    d_bias = torch.empty_like(bias) if want_bias else hidden.new_empty(0)
    for columns in _blocks(v, COLUMNS):
        w = weight[columns].to(dtype)
        of_weight, of_bias = torch.zeros_like(w) if want_weight else None, w.new_zeros(len(w))
        for rows in _blocks(m, ROWS):
            h = hidden[rows].to(dtype)
            z = _logits(h, weight, bias, columns).sub_(lse[rows, None]).exp_()
            inside, place = _here(targets[rows], columns)
            z.scatter_add_(1, place[:, None], ((label_smoothing - 1) * inside.to(dtype))[:, None])
            if label_smoothing:
                z -= label_smoothing / v
            z *= grad[rows, None]
            if want_hidden:
                d_hidden[rows].addmm_(z, w)
            if want_weight:
                of_weight.addmm_(z.T, h)
            if want_bias:
                of_bias += z.sum(0)
        if want_weight:
            d_weight[columns] = of_weight
        if want_bias:
            d_bias[columns] = of_bias
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _fake(hidden, weight, bias, targets, ignore_index, label_smoothing):
    _check(hidden, weight, bias, targets, label_smoothing)
    shape, dtype = hidden.shape[:1], _sum_dtype(hidden)
    return hidden.new_empty(shape, dtype=dtype), hidden.new_empty(shape, dtype=dtype)


def _backward_fake(
    grad, hidden, weight, bias, targets, lse, ignore_index, label_smoothing,
    want_hidden, want_weight, want_bias,
):  # fmt: skip
    nothing = hidden.new_empty(0)
    return (
        hidden.new_empty(hidden.shape) if want_hidden else nothing,
        hidden.new_empty(weight.shape) if want_weight else nothing,
        hidden.new_empty(len(weight)) if want_bias else nothing,
    )


_op_backward = define("linear_cross_entropy_backward", _backward_reference, _backward_fake)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    want = ctx.needs_input_grad[:3]
    grads = _op_backward(grad, *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing, *want)
    return *(g if wanted else None for g, wanted in zip(grads, want)), None, None, None


_op = define("linear_cross_entropy", _reference, _fake, _backward, _setup_context)
register_autocast(_op, (0, 1, 2))


def _cpu(hidden, weight, bias, targets, ignore_index, label_smoothing):
    """The products are torch's (MKL), and nothing else takes time; targets are there to be looked at."""
    _check(hidden, weight, bias, targets, label_smoothing)
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))]
    if len(wrong):
        raise ValueError(
            f"targets: got {int(wrong[0])}, accepted are 0 to {len(weight) - 1} and {ignore_index}"
        )
    return _reference(hidden, weight, bias, targets, ignore_index, label_smoothing)


torch.library.impl("memlm::linear_cross_entropy", "CPU", _cpu)
torch.library.impl("memlm::linear_cross_entropy_backward", "CPU", _backward_reference)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """``cross_entropy(linear(hidden, weight, bias), targets)`` of torch.nn.functional, without storing
    the logits, forward or backward (arXiv:2411.09009): the gradient computes them again.

    hidden ``[..., k]``, weight ``[v, k]``, bias ``[v]``: f32, bf16 or f16, all the same.
    targets: int64 ``[...]``, 0 to v - 1, or ``ignore_index``, for which the loss is 0.
    reduction: ``"mean"`` (over the targets that are not ignored; NaN where all are), ``"sum"``,
        ``"none"``: ``[...]``.  The result is f32.
    label_smoothing: share of the target's weight that all v share (arXiv:1512.00567), 0 to 1.

    Logits, their exponentials and all sums are f32.  Memory beside inputs, result and gradients, on the
    CPU: up to 2,048 x 4,096 logits, 32 MB, and an f32 copy of as many rows of hidden and weight; for
    16-bit numbers backward also f32 sums of hidden's gradient, 4 k bytes for each token.  GPU kernels take
    f16 and bf16; forward they store no logits, backward the gradients of up to 2^26 at once, 128 MB,
    rounded to the dtype.  There a target out of range gives NaN; on the CPU it is an error.
    Differentiable once, in hidden, weight, bias.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if x is None and name == "bias":
            continue
        if not isinstance(x, torch.Tensor) or (x.dtype not in X_DTYPES and name != "targets"):
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name}: got {got}, accepted are tensors of {X_DTYPES}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, accepted are {REDUCTIONS}")
    if hidden.dim() < 1 or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: got shape {list(targets.shape)}, expected {list(hidden.shape[:-1])}, that of hidden's rows"
        )
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    given = (rows, weight, bias, flat)
    try:
        losses, _ = _op(*given, ignore_index, label_smoothing)
    except Exception:  # the op checks all of this again, after autocast, which may make it fit
        _check(*given, label_smoothing)
        raise
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (flat != ignore_index).sum()
