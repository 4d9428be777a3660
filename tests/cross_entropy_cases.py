"""Cases of linear_cross_entropy, and what they should give: in f64, with how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .numerics import ROUNDOFF, SMALLEST

IGNORED = -100
FLUSHED = 2.0**-126  # exponentials below may become 0, and so may what goes in and out of torch's bf16 products
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    m: int
    k: int
    v: int
    bias: bool = False
    smoothing: float = 0.0
    ignored: float = 0.0  # share of targets
    size: float = 1.0  # of logits, about


CASES = [
    Case(0, 8, 5), Case(1, 1, 1), Case(5, 33, 100, True), Case(70, 64, 300, ignored=0.3),
    Case(130, 72, 259, True, 0.1, 0.1), Case(3, 40, 700, size=30.0), Case(9, 16, 20, smoothing=1.0),
]  # fmt: skip


@dataclass
class Given:
    """The arguments of the op."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    smoothing: float

    def arguments(self) -> tuple:
        return self.hidden, self.weight, self.bias, self.targets, IGNORED, self.smoothing


def random_case(case: Case, dtype: torch.dtype) -> Given:
    generator = torch.Generator().manual_seed(case.m + case.v)
    hidden = torch.randn(case.m, case.k, generator=generator)
    weight = torch.randn(case.v, case.k, generator=generator) * case.size / math.sqrt(case.k)
    bias = torch.randn(case.v, generator=generator).to(dtype) if case.bias else None
    targets = torch.randint(case.v, (case.m,), generator=generator)
    targets[torch.rand(case.m, generator=generator) < case.ignored] = IGNORED
    return Given(hidden.to(dtype), weight.to(dtype), bias, targets, case.smoothing)


class Exact(NamedTuple):
    losses: torch.Tensor
    lse: torch.Tensor
    bound: torch.Tensor  # of both
    p: torch.Tensor  # probabilities, and what each may be off by, relative to it
    off: torch.Tensor  # [m, 1]


def forward_in_f64(given: Given) -> Exact:
    """Logits are f32 sums of products of the given numbers; exponentials and their sum are f32."""
    u, (m, k), v = ROUNDOFF[torch.float32], given.hidden.shape, len(given.weight)
    h, w = given.hidden.double(), given.weight.double()
    z, off = h @ w.T, (4 + 5 * math.sqrt(k)) * u * (h.abs() @ w.abs().T)
    if given.bias is not None:
        z, off = z + given.bias.double(), off + u * given.bias.double().abs()
    lse = z.logsumexp(1)
    used = given.targets != IGNORED
    place = given.targets.where(used, 0)[:, None]
    losses = lse - (1 - given.smoothing) * z.gather(1, place)[:, 0] - given.smoothing * z.mean(1)
    # A logit's own error; its rounding in units of log2 and with the maximum subtracted; the sum.
    worst = off.amax(1, keepdim=True) if m else off[:, :1]
    largest = z.abs().amax(1, keepdim=True) if m else z[:, :1]
    off = 2 * worst + (16 + 5 * math.sqrt(v)) * u + 8 * u * largest
    bound = 2 * off[:, 0]
    if given.smoothing:
        bound = bound + 5 * math.sqrt(v) * u * largest[:, 0]
    return Exact(losses.where(used, 0), lse, bound, (z - lse[:, None]).exp(), off)


def logit_gradients_in_f64(given: Given, grad: torch.Tensor, rounded: bool):
    """``[m, v]`` and bounds; ``rounded``: to the dtype."""
    u, dtype, m, v = ROUNDOFF[torch.float32], given.hidden.dtype, len(given.hidden), len(given.weight)
    exact = forward_in_f64(given)
    used = given.targets != IGNORED
    grad = grad.double().where(used, 0)[:, None]
    one = torch.zeros(m, v, dtype=torch.float64)
    one.scatter_(1, given.targets.where(used, 0)[:, None], 1.0)
    dz = grad * (exact.p - (1 - given.smoothing) * one - given.smoothing / v)
    off = grad.abs() * (exact.p * (2 * exact.off + 4 * u) + 4 * u * (one + given.smoothing / v))
    off = off + grad.abs() * FLUSHED
    if rounded:
        off = off + ROUNDOFF[dtype] * (dz.abs() + off) + SMALLEST[dtype] + FLUSHED
    return dz, off


def backward_in_f64(given: Given, grad: torch.Tensor, rounded: bool = False):
    """Gradients of hidden, weight and bias, with bounds; ``rounded``: those of logits are, on the way."""
    u, dtype, m, v = ROUNDOFF[torch.float32], given.hidden.dtype, len(given.hidden), len(given.weight)
    dz, off = logit_gradients_in_f64(given, grad, rounded)
    h, w = given.hidden.double(), given.weight.double()
    found = [
        (dz @ w, off @ w.abs() + (4 + 5 * math.sqrt(v)) * u * (dz.abs() @ w.abs())),
        (dz.T @ h, off.T @ h.abs() + (4 + 5 * math.sqrt(m)) * u * (dz.abs().T @ h.abs())),
        (dz.sum(0), off.sum(0) + (4 + 5 * math.sqrt(m)) * u * dz.abs().sum(0)),
    ]
    least = SMALLEST[dtype] + (FLUSHED if rounded else 0)
    return [(value, bound + ROUNDOFF[dtype] * (value.abs() + bound) + least) for value, bound in found]


def random_grad(given: Given) -> torch.Tensor:
    return torch.randn(len(given.hidden), generator=torch.Generator().manual_seed(5))
