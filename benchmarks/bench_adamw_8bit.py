"""``adamw_8bit`` against torch's fused AdamW: ``python -m benchmarks.bench_adamw_8bit --help``.

W is the parameter, and its own gradient; the bytes counted are those read and written of parameter,
gradient and state."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import optim

LR, DECAY, EPS = 1e-2, 0.1, 1e-8


def exact(_, w):
    """The first step."""
    w = w.double()
    return w * (1 - LR * DECAY) - LR * w / (w.abs() + EPS)


ADAMW_8BIT = harness.Operation(
    "adamw_8bit",
    x=lambda case: torch.empty(0),
    exact=exact,
    macs=lambda case: case.n * case.k,
    share=lambda case: 1.0,
)


def candidate(impl: str, format: str, dtype: torch.dtype, make, state_bytes: float, error: float):
    def prepare(w):
        # Copies: the parameter is written to.
        param, grad = torch.nn.Parameter(w.to(dtype, copy=True)), w.to(dtype, copy=True)
        moved = w.numel() * (3 * param.element_size() + 2 * state_bytes)
        return harness.Sized((param, grad, make([param])), round(moved))

    def run(_, stored):
        param, param.grad, optimizer = stored.value  # which copies of a parameter are without
        optimizer.step()
        return param.detach()

    return harness.Candidate(impl, format, "f32", error, prepare, run)


def ours(params):
    return optim.AdamW8bit(params, LR, eps=EPS, weight_decay=DECAY)


def fused(params):
    return torch.optim.AdamW(params, LR, eps=EPS, weight_decay=DECAY, fused=True)


CANDIDATES = [
    candidate("memlm", "f32", torch.float32, ours, 2 + 8 / 256, 1e-4),
    candidate("memlm", "bf16", torch.bfloat16, ours, 2 + 8 / 256, 0.01),
    candidate("torch_fused", "f32", torch.float32, fused, 8, 1e-4),
    candidate("torch_fused", "bf16", torch.bfloat16, fused, 4, 0.01),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(4096, 1024)], [1]))
def test_adamw_8bit(benchmark, case, candidate):
    harness.run_benchmark(benchmark, ADAMW_8BIT, case, candidate)


if __name__ == "__main__":
    harness.main(ADAMW_8BIT, CANDIDATES, "4096x1024,8192x4096", "1", "torch_fused")
