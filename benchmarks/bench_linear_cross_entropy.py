"""``linear_cross_entropy``, forward and backward, against torch's two operations:
``python -m benchmarks.bench_linear_cross_entropy --help``.

W is the weight of the last layer; the bytes counted are the weight's and its gradient's."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import ops


def targets(x, w):
    return torch.arange(len(x)) * 7 % len(w)


def exact(x, w):
    """The gradient of the weight."""
    z = x.double() @ w.double().T
    p = z.softmax(1)
    p[torch.arange(len(x)), targets(x, w)] -= 1
    return p.T @ x.double() / len(x)


LINEAR_CROSS_ENTROPY = harness.Operation(
    "linear_cross_entropy",
    x=lambda case: torch.randn(case.m, case.k) / case.k**0.5,
    exact=exact,
    macs=lambda case: 4 * case.m * case.n * case.k,  # the logits twice, and two gradients
    share=lambda case: 1.0,
)


def candidate(impl: str, loss):
    @torch.inference_mode(False)  # in which benchmarks run; what was made in it has no gradients
    @torch.enable_grad()
    def run(x, stored):
        hidden, weight = x.clone().requires_grad_(), stored.value.clone().requires_grad_()
        loss(hidden, weight, targets(x, weight)).backward()
        return weight.grad

    return harness.Candidate(
        impl, "f32", "f32", 1e-4, lambda w: harness.Sized(w, 2 * w.nbytes), run
    )


CANDIDATES = [
    candidate("memlm", ops.linear_cross_entropy),
    candidate("torch", lambda h, w, t: F.cross_entropy(F.linear(h, w), t)),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(8192, 256)], [512]))
def test_linear_cross_entropy(benchmark, case, candidate):
    harness.run_benchmark(benchmark, LINEAR_CROSS_ENTROPY, case, candidate)


if __name__ == "__main__":
    harness.main(LINEAR_CROSS_ENTROPY, CANDIDATES, "49152x576,49152x2048", "512,4096", "torch")
