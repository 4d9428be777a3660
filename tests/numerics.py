"""What a kernel's result may be off by, derived from its arithmetic.

A sum of n terms, each rounded, is off by at most about ``5 sqrt(n) u sum|terms|`` except with
negligible probability (u: unit roundoff; Higham and Mary 2019, SIAM J. Sci. Comput. 41(5), with
lambda = 5), where the worst case ``n u`` would let a missing term of a long sum pass.
"""

import math

import torch
import torch.nn.functional as F

import memlm
from memlm import formats, sparse_formats
from memlm.formats import ACT_GROUP, Packed
from memlm.ops import _matmul
from memlm.ops._matmul import prologue, quantize_activations
from memlm.sparse_formats import SparsePacked

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def dequantize(packed: Packed | SparsePacked, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[n, k], f64 or rounded."""
    module = sparse_formats if isinstance(packed, SparsePacked) else formats
    return module.dequantize(packed, dtype)


def fast_weights(packed: Packed | SparsePacked) -> torch.Tensor:
    """f64 [n, k], as integer sums see them."""
    dense = sparse_formats.to_dense(packed) if isinstance(packed, SparsePacked) else packed
    return _matmul.fast_weights(dense, torch.float64)


def magnitudes(packed: Packed | SparsePacked) -> torch.Tensor:
    """f64 [n, k]: ``|s q'| + |o|``, what a weight's two parts add up to without cancelling."""
    weights = dequantize(packed).abs()
    if packed.offsets is None:
        return weights
    if isinstance(packed, SparsePacked):
        packed = sparse_formats.to_dense(packed)
    offsets = formats.unpack(packed)[2].double().abs()
    offsets = offsets.repeat_interleave(packed.format.group, dim=1)[:, : packed.k]
    return weights + 2 * offsets  # |s q| <= |w| + |o|


# What numbers below bf16's normal range, 2^-126, may become on a tile unit, which takes them for 0:
# the parts of a number cut into three reach 2^-16 of it.
FLUSHED = {"f32": 0.0, "mma": 0.0, "int8": 0.0, "bf16": 2.0**-126, "bf16x3": 2.0**-126}


def arithmetic(implementation: str, m: int, fast: bool) -> str:
    """What a product of m rows is computed in: int8, f32, bf16, or three bf16 for each number.  On GPUs
    it is "mma": codes as integers and x in its own 16 bits, sums in f32."""
    from_rows = memlm.cpu.tile_rows(fast) if implementation == "cpp" else 0
    tiles = from_rows and m >= from_rows
    if fast:
        return "bf16" if tiles else "int8"
    return "bf16x3" if tiles else "f32"


def mma_weights(packed: Packed | SparsePacked, dtype: torch.dtype) -> torch.Tensor:
    """f64 [n, k], as "mma" sees them: levels of nf4 rounded to x's dtype."""
    if isinstance(packed, SparsePacked) and packed.format.is_float:
        return dequantize(packed)
    dense = sparse_formats.to_dense(packed) if isinstance(packed, SparsePacked) else packed
    if dense.format.codebook != "nf":
        return dequantize(packed)
    values = formats.values(dense.format, torch.float64, "cpu").to(dtype).double()
    return formats.dequantize_with(dense, values, torch.float64)


def exact_matmul(x, packed: Packed | SparsePacked, bias, arithmetic: str, y_dtype=None):
    """The product in f64 over the unpacked weights, of the numbers that the arithmetic works with,
    and the bound on a kernel's distance from it; its result is of ``y_dtype``, by default x's."""
    rows, u = x.reshape(-1, packed.k).float(), ROUNDOFF[torch.float32]
    w, size_w, terms = dequantize(packed), magnitudes(packed), packed.k
    if arithmetic == "int8":
        q, scale = quantize_activations(rows)
        rows = (q.double() * scale.double()).view(rows.shape[0], -1)[:, : packed.k]
        w, terms = fast_weights(packed), -(-packed.k // ACT_GROUP)
        size_w = size_w.maximum(w.abs())
    elif arithmetic == "bf16":  # the kernel's weights are one FMA: rounded once to f32
        rows, w = rows.bfloat16().double(), w.float().bfloat16().double()
        size_w = w.abs()
    elif arithmetic == "mma":
        w = mma_weights(packed, x.dtype)
        size_w = size_w.maximum(w.abs())
    rows = rows.double()
    y = rows @ w.T
    size = rows.abs() @ size_w.T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    # 4: the dequantised weight, the product, the scale and the bias round once each; 4 more: the
    # products of parts that are left out.
    roundings = 8 if arithmetic == "bf16x3" else 4
    bound = (roundings + 5 * math.sqrt(terms)) * u * size
    flushed = FLUSHED[arithmetic] * 2 * (rows.abs().sum(1)[:, None] + w.abs().sum(1) + packed.k)
    bound += flushed + _rounding(y_dtype or x.dtype, y, bound)
    shape = (*x.shape[:-1], packed.n)
    return y.view(shape), bound.view(shape)


def _rounding(dtype: torch.dtype, y: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Of numbers so far from y, once more."""
    return ROUNDOFF[dtype] * (y.abs() + bound) + SMALLEST[dtype]


def product_bound(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The bound on an f32 product, of magnitudes ``a [m, k]`` and ``b [k, n]`` in f64."""
    u = ROUNDOFF[torch.float32]
    return (4 + 5 * math.sqrt(a.shape[1])) * u * (a @ b) + SMALLEST[torch.float32]


def exact_around(
    x, packed: Packed | SparsePacked, arithmetic: str, norm=None, eps=0.0, swiglu=False, residual=None, y_dtype=None
):
    """As exact_matmul, for a product with the layers around it.

    The kernel's left side h is off by a few roundings, and by those of a sum of k squares with norm.
    int8 rounds it to steps of 1/127 of its group's largest, bf16 both sides to steps of 2^-7 of
    themselves: k independent errors of variance step^2 / 12, whose sum stays within 7 standard
    deviations.
    """
    u, k = ROUNDOFF[torch.float32], packed.k
    h = prologue(x.double(), k, norm, eps).reshape(-1, k)
    off = (16 + (5 * math.sqrt(k) if norm is not None else 0)) * u * h.abs()
    if arithmetic == "mma":  # h itself is rounded where a norm makes it
        off += (ROUNDOFF[x.dtype] * h.abs() + SMALLEST[x.dtype]) if norm is not None else 0
        w = mma_weights(packed, x.dtype)
    else:
        w = (fast_weights if arithmetic == "int8" else dequantize)(packed)
    y = h @ w.T
    bound = (8 + 5 * math.sqrt(k)) * u * (h.abs() @ magnitudes(packed).T)
    bound += off @ magnitudes(packed).T + FLUSHED[arithmetic] * 2 * (h.abs().sum(1)[:, None] + k)
    if arithmetic == "int8":
        groups = torch.zeros(h.shape[0], -(-k // ACT_GROUP) * ACT_GROUP, dtype=torch.float64)
        groups[:, :k] = h.abs()
        largest = groups.view(h.shape[0], -1, ACT_GROUP).amax(-1, keepdim=True)
        step = (largest / 127).expand(-1, -1, ACT_GROUP).reshape(h.shape[0], -1)[:, :k]
        bound += 7 * ((step.square() / 12) @ w.square().T).sqrt()
    elif arithmetic == "bf16":
        bound += 7 * (2 * 2.0**-14 / 12 * (h.square() @ w.square().T)).sqrt()
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        off_gate, off_up = bound.chunk(2, dim=-1)
        y = F.silu(gate) * up
        # silu's slope is below 1.1; exp and what follows it round a few times
        bound = 1.1 * off_gate * (up.abs() + off_up) + F.silu(gate).abs() * off_up + 8 * u * y.abs()
    if residual is not None:
        rows = residual.reshape(y.shape).double()
        y, bound = y + rows, bound + u * (y.abs() + rows.abs())
    bound += _rounding(y_dtype or x.dtype, y, bound)
    shape = (*x.shape[:-1], y.shape[-1])
    return y.view(shape), bound.view(shape)


def exact_unpacked(x, packed: Packed | SparsePacked, bias, norm=None, eps=0.0, swiglu=False, residual=None):
    """The product as csrc/torch/unpacked.h and kernels/_unpacked.py compute it, in f64, and a bound on what they
    are off by.  They round to x's type: weights, which the exact product has so; normalised rows, twice and their
    product with the norm; sums, and the parts they may be made of; gate, up and their product; at last the sum
    with the residual."""
    w, u, h = dequantize(packed, x.dtype).double(), ROUNDOFF[x.dtype], x.double()
    off = torch.zeros_like(h)
    if norm is not None:
        h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
        off = 3 * u * h.abs() + SMALLEST[x.dtype]
    y, size = h @ w.T, h.abs() @ w.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    bound = off @ w.abs().T + 2 * u * size + SMALLEST[x.dtype]
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        off_gate, off_up = bound.chunk(2, dim=-1)
        y = F.silu(gate) * up
        # silu's slope is below 1.1
        off_gate = 1.1 * off_gate + u * F.silu(gate).abs()
        bound = off_gate * (up.abs() + off_up) + F.silu(gate).abs() * off_up
        bound = bound + u * (y.abs() + bound) + SMALLEST[x.dtype]
    if residual is not None:
        y = y + residual.double()
        bound = bound + u * (y.abs() + bound)
    return y, bound


def assert_within(result: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element within its own bound (NaN is not)."""
    error = (result.double() - exact).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        worst = (error / bound).nan_to_num(float("inf")).flatten().argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} beyond the bound; worst at {int(worst)}: got "
            f"{result.flatten()[worst]}, exact {exact.flatten()[worst]}, bound {bound.flatten()[worst]}"
        )
