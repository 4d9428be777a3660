"""``quantize_rows`` against torch: ``python -m benchmarks.bench_quantize_rows --help``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import ops


def by_torch(_, x):
    scales = x.abs().amax(1, keepdim=True) / 127
    return (x / scales).round().to(torch.int8), scales


def value(result):
    codes, scales = result
    span = -(-codes.shape[1] // scales.shape[1])
    return codes * scales.repeat_interleave(span, dim=1)[:, : codes.shape[1]]


def candidate(impl, format, run):
    return harness.Candidate(impl, format, "f32", harness.ROUNDING[8], lambda x: x, run, value=value)


CANDIDATES = [
    candidate("memlm", "int8-row", lambda _, x: ops.quantize_rows(x)),
    candidate("memlm", "int8-g32", lambda _, x: ops.quantize_rows(x, 32)),
    candidate("torch", "int8-row", by_torch),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(512, 4096)], [1]))
def test_quantize_rows(benchmark, case, candidate):
    harness.run_benchmark(benchmark, harness.QUANTIZE_ROWS, case, candidate)


if __name__ == "__main__":
    harness.main(harness.QUANTIZE_ROWS, CANDIDATES, "1x4096,32x4096,512x4096", "1", "torch")
