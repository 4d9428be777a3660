"""What ``w4_matmul`` and ``w8_matmul`` share: argument checks, the torch reference, the gradient
and autocast.  The two files beside this one hold what differs: signature and documentation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from memlm import formats
from memlm.formats import ACT_GROUP, Format, Packed

X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of W dequantised at a time for the gradient: 1,024 rows of 4,096 are 16 MB of f32.
GRAD_ROWS = 1024


def check(x, packed: Packed, bias, norm=None, swiglu=False, residual=None) -> tuple[int, ...]:
    """Raises TypeError or ValueError naming the argument that does not fit; returns y's shape."""
    if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, accepted are tensors of {X_DTYPES}")
    columns = 2 * packed.k if swiglu else packed.k
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., {columns}]")
    if norm is not None and swiglu:
        raise ValueError("swiglu: got True together with norm, accepted is one of them")
    shape = (*x.shape[:-1], packed.n)
    for name, tensor in packed.tensors().items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
    for name, tensor, wanted in (
        ("bias", bias, (packed.n,)),
        ("norm", norm, (packed.k,)),
        ("residual", residual, shape),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != x.dtype:
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {got}, expected {x.dtype}, as x")
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {list(wanted)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
    return shape


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [m, k]`` f32 -> codes ``[m, groups, 32]`` and scales ``[m, groups, 1]``, both f32.

    Symmetric, one scale per 32 consecutive k: ``s = amax / 127``, ``q = rint(x * (127 / amax))``,
    the rounding of the CPU kernels to the last bit.  Where amax is so small that ``127 / amax``
    overflows, scale and codes are 0; a group with Inf or NaN has scale NaN, so that what it
    reaches becomes NaN.
    """
    m, k = x.shape
    padded = x.new_zeros(m, -(-k // ACT_GROUP) * ACT_GROUP)
    padded[:, :k] = x
    groups = padded.view(m, -1, ACT_GROUP)
    amax = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(amax, 127) / amax  # torch computes 127 / amax as 127 * (1 / amax)
    usable = torch.isfinite(inverse) & torch.isfinite(amax)
    scale = torch.where(usable, amax / 127, 0.0)
    scale = torch.where(torch.isfinite(amax), scale, torch.nan)
    q = torch.where(usable, groups * inverse, 0.0).round()
    return q, scale


def prologue(x: torch.Tensor, k: int, norm, eps: float, swiglu: bool) -> torch.Tensor:
    """The step before the product, in f32 (f64 for f64): ``[..., k]``, or ``[..., 2k]`` with
    swiglu, -> ``[..., k]``."""
    x = x if x.dtype == torch.float64 else x.float()
    if norm is not None:
        return F.rms_norm(x, (k,), norm.to(x.dtype), eps)
    return F.silu(x[..., :k]) * x[..., k:] if swiglu else x


def reference(x, packed: Packed, bias, fast: bool, norm, eps, swiglu, residual) -> torch.Tensor:
    """The operation in plain torch: what the kernels are measured against."""
    shape = check(x, packed, bias, norm, swiglu, residual)
    rows = prologue(x, packed.k, norm, eps, swiglu).reshape(-1, packed.k)
    if fast:
        q, scale = quantize_activations(rows)
        rows = (q * scale).view(rows.shape[0], -1)[:, : packed.k]
    y = rows @ formats.dequantize(packed).T
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.reshape(y.shape).float()
    return y.to(x.dtype).view(shape)


def fake(x, packed: Packed, bias, norm, swiglu, residual) -> torch.Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(check(x, packed, bias, norm, swiglu, residual))


def grad_x(grad: torch.Tensor, packed: Packed) -> torch.Tensor:
    """``grad [..., n] @ W``, dequantising GRAD_ROWS rows of W at a time.

    This is the accurate product in both modes: rounding the activations is treated as the identity
    (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
    """
    codes, scales, offsets = packed.codes, packed.scales, packed.offsets
    total = None
    for row in range(0, packed.n, GRAD_ROWS):
        rows = min(GRAD_ROWS, packed.n - row)
        w = torch.ops.memlm.dequantize(
            codes, scales, offsets, packed.n, packed.k, packed.format.group, row, rows, grad.dtype
        )
        part = grad[..., row : row + rows] @ w
        total = part if total is None else total + part
    return total


def grad_prologue(grad, x, norm, eps: float, swiglu: bool):
    """Gradients of x and norm, from that of the product's left side ``grad [..., k]``."""
    if norm is None and not swiglu:
        return grad, None
    k = grad.shape[-1]
    h, g = x.float(), grad.float()
    if swiglu:
        gate, up = h[..., :k], h[..., k:]
        s = torch.sigmoid(gate)
        parts = (g * up * s * (1 + gate * (1 - s)), g * gate * s)
        return torch.cat(parts, dim=-1).to(x.dtype), None
    factor = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * factor
    gw = g * norm.float()
    grad_x = factor * (gw - h * (gw * h).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (g * h).reshape(-1, k).sum(0).to(norm.dtype)


def grad_bias(grad: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def setup_context(ctx, inputs, floats: tuple[int, ...]) -> None:
    """Keeps what :func:`backward` needs.  ``floats``: where x, bias, norm and residual stand among
    the op's arguments; the packed tensors follow x, and n, k, group come before bias."""
    x_at, bias_at, norm_at, _ = floats
    x, norm = inputs[x_at], inputs[norm_at]
    ctx.eps, ctx.swiglu = inputs[norm_at + 1 : norm_at + 3]
    ctx.sizes = inputs[bias_at - 3 : bias_at]
    x = x if norm is not None or ctx.swiglu else None  # the product's gradient needs no x
    ctx.save_for_backward(x, norm, *inputs[x_at + 1 : bias_at - 3])


def backward(ctx, grad, pack: Callable[..., Packed], floats: tuple[int, ...]) -> tuple:
    """Gradients of all of the op's arguments: of those at ``floats`` where they are asked for,
    None of the others.  ``pack``: packed tensors, n, k, group -> :class:`Packed`."""
    x, norm, *tensors = ctx.saved_tensors
    x_wanted, bias_wanted, norm_wanted, residual_wanted = (ctx.needs_input_grad[i] for i in floats)
    grads = [None] * len(ctx.needs_input_grad)
    x_at, bias_at, norm_at, residual_at = floats
    if x_wanted or norm_wanted:
        product = grad_x(grad, pack(*tensors, *ctx.sizes))
        grads[x_at], grads[norm_at] = grad_prologue(product, x, norm, ctx.eps, ctx.swiglu)
    if bias_wanted:
        grads[bias_at] = grad_bias(grad)
    if residual_wanted:
        grads[residual_at] = grad
    return tuple(grads)


def packed_of(bits: int, codes, scales, offsets, n: int, k: int, group: int) -> Packed:
    """The op's tensor arguments as a checked :class:`Packed`."""
    return Packed(Format(bits, group, offsets is None), n, k, codes, scales, offsets)


def register_autocast(op, cast_arguments: tuple[int, ...]) -> None:
    """Under autocast the arguments at these positions (x, bias, norm, residual) are cast to the
    autocast dtype, as for torch.nn.functional.linear; the packed tensors never are."""

    def make(device: str):
        def run(*args):
            dtype = torch.get_autocast_dtype(device)
            cast = list(args)
            for i in cast_arguments:
                if cast[i] is not None and cast[i].is_floating_point():
                    cast[i] = cast[i].to(dtype)
            with torch.autocast(device, enabled=False):
                return op(*cast)

        return run

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        torch.library.impl(op.name(), key, make(device))
