"""What the matmuls share: argument checks, the torch reference, the gradient and autocast.  Their
files hold what differs: signature and documentation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from memlm import formats
from memlm.formats import ACT_GROUP, Format, Packed
from memlm.ops import _registry

CODEBOOKS = list(formats.CODEBOOKS)  # ops take the place of one in this list
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of W dequantised at a time for the gradient: 1,024 rows of 4,096 are 16 MB of f32.
GRAD_ROWS = 1024


def check(x, packed: Packed, bias, norm=None, swiglu=False, residual=None) -> tuple[int, ...]:
    """Raises TypeError or ValueError naming the argument that does not fit; returns y's shape."""
    if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, accepted are tensors of {X_DTYPES}")
    return check_shapes(x, x.dtype, packed, bias, norm, swiglu, residual)


def check_shapes(x, dtype, packed: Packed, bias, norm, swiglu, residual) -> tuple[int, ...]:
    """As :func:`check`, for any x; the other tensors are of ``dtype``."""
    if x.dim() < 1 or x.shape[-1] != packed.k:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., {packed.k}]")
    if swiglu and packed.n % (2 * formats.TILE_ROWS):
        raise ValueError(
            f"swiglu: W has {packed.n} rows, accepted are multiples of {2 * formats.TILE_ROWS}"
        )
    shape = (*x.shape[:-1], packed.n // 2 if swiglu else packed.n)
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
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {got}, expected {dtype}, as x or the result")
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {list(wanted)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
    return shape


def quantize_activations(x: torch.Tensor, group: int = ACT_GROUP):
    """``x [m, k]`` f32 -> codes ``[m, groups, span]`` and scales ``[m, groups, 1]``, both f32; span
    is 32, or with ``group`` 0 all k.

    Symmetric, one scale per span: ``s = amax / 127``, ``q = rint(x * (127 / amax))``, the rounding
    of the CPU kernels to the last bit.  Where amax is so small that ``127 / amax`` overflows, scale
    and codes are 0; a span with Inf or NaN has scale NaN, so that what it reaches becomes NaN.
    """
    m, k = x.shape
    span = group or k
    padded = x.new_zeros(m, -(-k // span) * span)
    padded[:, :k] = x
    groups = padded.view(m, padded.shape[1] // span, span)
    amax = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(amax, 127) / amax  # torch computes 127 / amax as 127 * (1 / amax)
    usable = torch.isfinite(inverse) & torch.isfinite(amax)
    scale = torch.where(usable, amax / 127, 0.0)
    scale = torch.where(torch.isfinite(amax), scale, torch.nan)
    q = torch.where(usable, groups * inverse, 0.0).round()
    return q, scale


def prologue(x: torch.Tensor, k: int, norm, eps: float) -> torch.Tensor:
    """The step before the product, in f32 (f64 for f64)."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if norm is None else F.rms_norm(x, (k,), norm.to(x.dtype), eps)


def epilogue(y: torch.Tensor, bias, swiglu: bool, residual) -> torch.Tensor:
    """The steps after the product, in y's dtype."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is not None:
        y = y + residual.reshape(y.shape).to(y.dtype)
    return y


def fast_weights(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``W [n, k]`` as integer sums see it: levels of nf4 rounded to 1/127 of the largest."""
    format = packed.format
    if format.codebook != "nf":
        return formats.dequantize(packed, dtype)
    values = formats.values(format, torch.float64, packed.codes.device)
    largest = values.abs().max()
    values = (values * (127 / largest)).round() * (largest / 127)
    return formats.dequantize_with(packed, values.to(dtype), dtype)


def reference(x, packed: Packed, bias, fast: bool, norm, eps, swiglu, residual) -> torch.Tensor:
    """The operation in plain torch: what the kernels are measured against."""
    check(x, packed, bias, norm, swiglu, residual)
    w = fast_weights(packed) if fast else formats.dequantize(packed)
    return reference_of_floats(x, w, bias, fast, norm, eps, swiglu, residual)


def reference_of_floats(x, w, bias, fast: bool, norm, eps, swiglu, residual) -> torch.Tensor:
    """The same for checked arguments and a float ``w [n, k]``."""
    n, k = w.shape
    rows = prologue(x, k, norm, eps).reshape(-1, k)
    if fast:
        q, scale = quantize_activations(rows)
        rows = (q * scale).flatten(1)[:, :k]
    y = epilogue(rows @ w.T, bias, swiglu, residual)
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def fake(x, packed: Packed, bias, norm, swiglu, residual) -> torch.Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(check(x, packed, bias, norm, swiglu, residual))


def grad_x(grad: torch.Tensor, dequantized: Callable) -> torch.Tensor:
    """``grad [..., n] @ W``, with GRAD_ROWS rows of W at a time: ``dequantized(row, rows, dtype)``.

    This is the accurate product in both modes: rounding the activations is treated as the identity
    (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
    """
    n, total = grad.shape[-1], None
    for row in range(0, n, GRAD_ROWS):
        rows = min(GRAD_ROWS, n - row)
        part = grad[..., row : row + rows] @ dequantized(row, rows, grad.dtype)
        total = part if total is None else total + part
    return total


def _grad_x_dense(bits: int):
    """:func:`grad_x` over the dense weights among an op's arguments."""

    def run(grad, given):
        weights = weight_arguments(packed_given(bits, given))
        return grad_x(grad, lambda *rows: torch.ops.memlm.dequantize(*weights, *rows))

    return run


def grad_norm(grad, x, norm, eps: float):
    """Gradients of x and of RMSNorm's weight, from that of the product's left side."""
    h, g = x.float(), grad.float()
    factor = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * factor
    gw = g * norm.float()
    grad_x = factor * (gw - h * (gw * h).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (g * h).reshape(-1, h.shape[-1]).sum(0).to(norm.dtype)


def grad_swiglu(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient of ``y [..., n]``, gate beside up, from that of ``silu(gate) * up``."""
    gate, up = y.float().chunk(2, dim=-1)
    g, s = grad.float(), torch.sigmoid(gate)
    return torch.cat((g * up * s * (1 + gate * (1 - s)), g * gate * s), dim=-1).to(grad.dtype)


def grad_bias(grad: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


class Arguments:
    """Where an op's arguments stand: ``names``, as its schema has them; and gradients, from that of
    the product ``grad [..., n]``: of its left side, ``grad_x(grad, given)``, and where codes can
    have one of theirs, ``grad_codes(grad, left, given)``."""

    def __init__(self, op, names: list[str], grad_x: Callable, grad_codes: Callable | None):
        self.op, self.names, self.grad_x, self.grad_codes = op, names, grad_x, grad_codes
        self.floats = tuple(self.names.index(x) for x in ("x", "bias", "norm", "residual"))

    def setup_context(self, ctx, inputs, output) -> None:
        """Keeps what :meth:`backward` needs."""
        given = dict(zip(self.names, inputs))
        codes = ctx.needs_input_grad[self.names.index("codes")]
        if given["norm"] is None and not given["swiglu"] and not codes:
            given["x"] = None  # the product's gradient needs no x
        given["residual"] = None
        ctx.tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(given.pop(name) for name in ctx.tensors))
        ctx.others = given

    def backward(self, ctx, grad) -> tuple:
        """Gradients of all of the op's arguments: of x, codes, bias, norm and residual where they
        are asked for, None of the others."""
        given = {**ctx.others, **dict(zip(ctx.tensors, ctx.saved_tensors))}
        grads = dict.fromkeys(self.names)
        wanted = dict(zip(self.names, ctx.needs_input_grad))
        if wanted["residual"]:
            grads["residual"] = grad
        if given["swiglu"] and any(wanted[name] for name in ("x", "codes", "norm", "bias")):
            again = {**given, "swiglu": False, "residual": None}
            grad = grad_swiglu(grad, self.op(*(again[name] for name in self.names)))
        if wanted["x"] or wanted["norm"]:
            product = self.grad_x(grad, given)
            if given["norm"] is None:
                grads["x"] = product
            else:
                grads["x"], grads["norm"] = grad_norm(product, given["x"], given["norm"], given["eps"])
        if wanted["codes"]:
            left = prologue(given["x"], given["k"], given["norm"], given["eps"])
            grads["codes"] = self.grad_codes(grad, left, given)
        if wanted["bias"]:
            grads["bias"] = grad_bias(grad)
        return tuple(grads.values())


def define(
    name: str,
    arguments: str,
    reference: Callable,
    fake: Callable,
    grad_x: Callable,
    grad_codes: Callable | None = None,
):
    """Adds to the C++ op what torch needs beside the kernel.  ``arguments``: the names of the op's
    arguments; ``reference`` and ``fake`` take a dict of them; gradients as :class:`Arguments` says."""
    names = arguments.split()

    def named(function):
        return lambda *args: function(dict(zip(names, args)))

    qualified = getattr(torch.ops.memlm, name).default
    table = Arguments(qualified, names, grad_x, grad_codes)
    op = _registry.define(name, named(reference), named(fake), table.backward, table.setup_context)
    register_autocast(op, table.floats)
    return op


def define_dense(name: str, bits: int, arguments: str, reference: Callable, fake: Callable):
    """:func:`define` for an op over ``bits``-bit dense weights."""
    return define(name, arguments, reference, fake, _grad_x_dense(bits))


def define_weight_only(name: str, bits: int, arguments: str):
    """:func:`define_dense` for an op over float x in one of two modes."""
    around = ("norm", "eps", "swiglu", "residual")

    def run(given):
        rest = (given[key] for key in ("bias", "fast", *around))
        return reference(given["x"], packed_given(bits, given), *rest)

    def shape(given):
        rest = (given[key] for key in ("bias", "norm", "swiglu", "residual"))
        return fake(given["x"], packed_given(bits, given), *rest)

    return define_dense(name, bits, arguments, run, shape)


def codebook_index(name: str) -> int:
    """Its place among ``CODEBOOKS``, which ops take.  Raises ValueError for others."""
    if name not in CODEBOOKS:
        raise ValueError(f"codebook: got {name!r}, accepted are {CODEBOOKS}")
    return CODEBOOKS.index(name)


def weight_arguments(packed: Packed) -> tuple:
    """What dequantize and embedding take of a packed W.  To the kernels ternary codes are numbers."""
    format = packed.format
    codebook = CODEBOOKS.index("nf" if format.codebook == "nf" else "int")
    sizes = (packed.n, packed.k, format.group)
    return (packed.codes, packed.scales, packed.offsets, format.bits, codebook, *sizes)


def packed_with(codes, scales, offsets, bits, codebook, n, k, group) -> Packed:
    """The inverse."""
    return packed_of(bits, codes, scales, offsets, n, k, group, codebook)


def packed_given(bits: int, given: dict) -> Packed:
    """Of a matmul's arguments by name."""
    sizes = (given["n"], given["k"], given["group"])
    tensors = (given["codes"], given["scales"], given.get("offsets"))
    return packed_of(bits, *tensors, *sizes, given.get("codebook", 0))


def packed_of(bits: int, codes, scales, offsets, n: int, k: int, group: int, codebook=0) -> Packed:
    """The op's tensor arguments as a checked :class:`Packed`."""
    format = Format(bits, group, offsets is None, CODEBOOKS[codebook])
    return Packed(format, n, k, codes, scales, offsets)


def register_autocast(op, cast_arguments: tuple[int, ...]) -> None:
    """Under autocast the arguments at these positions (x, bias, norm, residual) are cast to the
    autocast dtype, as for torch.nn.functional.linear; the packed tensors never are.  x comes first."""

    def make(device: str):
        def run(*args):
            dtype = torch.get_autocast_dtype(device)
            cast = list(args)
            # int8 x stays as it is, and so does what its result's dtype goes by.
            for i in cast_arguments if args[0].is_floating_point() else ():
                if cast[i] is not None and cast[i].is_floating_point():
                    cast[i] = cast[i].to(dtype)
            with torch.autocast(device, enabled=False):
                return op(*cast)

        return run

    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        torch.library.impl(op.name(), key, make(device))
