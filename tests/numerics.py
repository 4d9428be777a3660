"""What a kernel's result may be off by, derived from its arithmetic.

A sum of n terms, each rounded, is off by at most about ``5 sqrt(n) u sum|terms|`` except with
negligible probability (u: unit roundoff; Higham and Mary 2019, SIAM J. Sci. Comput. 41(5), with
lambda = 5), where the worst case ``n u`` would let a missing term of a long sum pass.
"""

import math

import torch

from memlm import formats
from memlm.formats import ACT_GROUP, Packed
from memlm.ops._matmul import prologue, quantize_activations

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def magnitudes(packed: Packed) -> torch.Tensor:
    """f64 [n, k]: ``|s q'| + |o|``, what a weight's two parts add up to without cancelling."""
    weights = formats.dequantize(packed, torch.float64).abs()
    if packed.offsets is None:
        return weights
    offsets = formats.unpack(packed)[2].double().abs()
    offsets = offsets.repeat_interleave(packed.format.group, dim=1)[:, : packed.k]
    return weights + 2 * offsets  # |s q| <= |w| + |o|


def exact_matmul(x: torch.Tensor, packed: Packed, bias, fast: bool):
    """The product in f64 over the unpacked weights, of the activations that the mode works with,
    and the bound on a kernel's distance from it."""
    rows, u = x.reshape(-1, packed.k).float(), ROUNDOFF[torch.float32]
    if fast:
        q, scale = quantize_activations(rows)
        rows = (q.double() * scale.double()).view(rows.shape[0], -1)[:, : packed.k]
        terms = -(-packed.k // ACT_GROUP)
    else:
        rows, terms = rows.double(), packed.k
    y = rows @ formats.dequantize(packed, torch.float64).T
    size = rows.abs() @ magnitudes(packed).T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    # 4: the dequantised weight, the product, the scale and the bias round once each.
    bound = (4 + 5 * math.sqrt(terms)) * u * size
    bound += ROUNDOFF[x.dtype] * (y.abs() + bound) + SMALLEST[x.dtype]
    shape = (*x.shape[:-1], packed.n)
    return y.view(shape), bound.view(shape)


def exact_around(x, packed: Packed, fast: bool, norm=None, eps=0.0, swiglu=False, residual=None):
    """As exact_matmul, for a product with the layers around it.

    The kernel's left side h is off by a few roundings (exp, division, products), and by those of a
    sum of k squares with norm.  Fast mode rounds it to steps of 1/127 of its group's largest: k
    independent errors of variance step^2 / 12, whose sum stays within 7 standard deviations.
    """
    u, k = ROUNDOFF[torch.float32], packed.k
    h = prologue(x.double(), k, norm, eps, swiglu).reshape(-1, k)
    off = (16 + (5 * math.sqrt(k) if norm is not None else 0)) * u * h.abs()
    w = formats.dequantize(packed, torch.float64)
    y = h @ w.T
    bound = (4 + 5 * math.sqrt(k)) * u * (h.abs() @ magnitudes(packed).T)
    bound += off @ magnitudes(packed).T
    if fast:
        groups = torch.zeros(h.shape[0], -(-k // ACT_GROUP) * ACT_GROUP, dtype=torch.float64)
        groups[:, :k] = h.abs()
        largest = groups.view(h.shape[0], -1, ACT_GROUP).amax(-1, keepdim=True)
        step = (largest / 127).expand(-1, -1, ACT_GROUP).reshape(h.shape[0], -1)[:, :k]
        bound += 7 * ((step.square() / 12) @ w.square().T).sqrt()
    if residual is not None:
        rows = residual.reshape(y.shape).double()
        y, bound = y + rows, bound + u * (y.abs() + rows.abs())
    bound += ROUNDOFF[x.dtype] * (y.abs() + bound) + SMALLEST[x.dtype]
    shape = (*x.shape[:-1], packed.n)
    return y.view(shape), bound.view(shape)


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
