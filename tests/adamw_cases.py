"""Cases of adamw_8bit, and a step in f64."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from memlm import dynamic_codes
from memlm.dynamic_codes import BLOCK

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    count: int
    step: int = 10
    moments: str = "random"  # or "zero"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


CASES = [
    Case(0), Case(1, 1, "zero"), Case(BLOCK), Case(BLOCK - 1), Case(3 * BLOCK + 5), Case(300, 1, "zero"),
    Case(40 * BLOCK + 100, 1000), Case(700, 3, betas=(0.0, 0.5), eps=1e-3, weight_decay=0.0),
]  # fmt: skip


@dataclass
class Given:
    """The arguments of the op."""

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_absmax: torch.Tensor
    exp_avg_sq: torch.Tensor
    exp_avg_sq_absmax: torch.Tensor
    numbers: tuple

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self)[:6])

    def clone(self) -> Given:
        return Given(*(t.clone() for t in self.tensors()), self.numbers)


def random_case(case: Case, dtype: torch.dtype) -> Given:
    """Gradients of sizes over four decades, moments of such gradients."""
    generator = torch.Generator().manual_seed(case.count)

    def spread() -> torch.Tensor:
        size = 10.0 ** (-4 * torch.rand(case.count, generator=generator))
        return torch.randn(case.count, generator=generator) * size

    param, grad = torch.randn(case.count, generator=generator), spread()
    m, v = spread(), spread() ** 2 + 1e-9
    if case.moments == "zero":
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    numbers = (1e-2, *case.betas, case.eps, case.weight_decay, case.step)
    moments = (*dynamic_codes.quantize(m, True), *dynamic_codes.quantize(v, False))
    return Given(param.to(dtype), grad.to(dtype), *moments, numbers)


def equal(got: Given, expected: Given) -> None:
    """To the last bit; NaN is NaN."""
    for field in fields(got)[:6]:
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape
        same = (a == b) | ((a != a) & (b != b))
        assert same.all(), (
            f"{field.name}: {int((~same).sum())} differ, the first at {int((~same).view(-1).nonzero()[0])}: "
            f"{a[~same][0]}, expected {b[~same][0]}"
        )


class Exact(NamedTuple):
    """f64: the new moments, the sum of magnitudes that the first one is of, the decayed parameter, what
    is taken from it, and the result."""

    m: torch.Tensor
    v: torch.Tensor
    size_m: torch.Tensor
    decayed: torch.Tensor
    step_size: torch.Tensor
    param: torch.Tensor


def step_in_f64(given: Given) -> Exact:
    lr, beta1, beta2, eps, weight_decay, step = given.numbers
    grad = given.grad.double()
    m, v = (
        dynamic_codes.decode(codes, signed).double() * absmax.double().repeat_interleave(BLOCK)[: len(codes)]
        for codes, absmax, signed in (
            (given.exp_avg, given.exp_avg_absmax, True), (given.exp_avg_sq, given.exp_avg_sq_absmax, False)
        )
    )  # fmt: skip
    size = beta1 * m.abs() + (1 - beta1) * grad.abs()
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad.square()
    decayed = given.param.double() * (1 - lr * weight_decay)
    divisor = (v / (1 - beta2**step)).sqrt() + eps
    taken = lr / (1 - beta1**step) * m / divisor
    # The first moment may cancel: its rounding counts by what it is the sum of.
    return Exact(m, v, size, decayed, lr / (1 - beta1**step) * size / divisor, decayed - taken)
