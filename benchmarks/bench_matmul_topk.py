"""``matmul_topk`` against all logits and torch's topk: ``python -m benchmarks.bench_matmul_topk --help``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import ops
from memlm.formats import Format, Packed

TOP = 40
FORMATS = ["int8-g32", "int4a-g32"]
MATMUL_TOPK = harness.Operation(
    "matmul_topk",
    x=lambda case: torch.randn(case.m, case.k),
    exact=lambda x, w: (x.double() @ w.double().T).topk(TOP).values,
    macs=lambda case: case.m * case.n * case.k,
    share=lambda case: 1.0,
)


def topk(x: torch.Tensor, w: Packed, mode: str, top: int):
    sizes = (w.format.bits, w.n, w.k, w.format.group)
    return ops.matmul_topk(x, w.codes, w.scales, w.offsets, *sizes, mode=mode, top=top)


def candidates(name: str) -> list[harness.Candidate]:
    """In the mode that the format has by default: the one operation, and two after each other."""
    mode = ops.mode_for(Format.parse(name), None)
    calls = {
        "memlm": lambda x, w: topk(x, w, mode, TOP)[0],
        "memlm_matmul": lambda x, w: ops.matmul(x, w).topk(TOP).values,
    }
    arithmetic = "i8" if mode == "fast" else "f32"
    return [harness.packed(name, call, impl, arithmetic) for impl, call in calls.items()]


CANDIDATES = [
    *(candidate for name in FORMATS for candidate in candidates(name)),
    harness.Candidate(
        "torch_f32",
        "f32",
        "f32",
        0.02,
        lambda w: w,
        lambda x, w: torch.nn.functional.linear(x, w).topk(TOP).values,
    ),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(49152, 576)], [1]))
def test_matmul_topk(benchmark, case, candidate):
    harness.run_benchmark(benchmark, MATMUL_TOPK, case, candidate)


if __name__ == "__main__":
    harness.main(MATMUL_TOPK, CANDIDATES, "49152x576,32000x2048", "1,16", "torch_f32")
