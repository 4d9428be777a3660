"""``dequantize`` against a cast from bf16: ``python -m benchmarks.bench_dequantize --help``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import ops

FORMATS = ["int4-g32", "int4a-g32", "int8-row", "int8-g32"]
CANDIDATES = [
    *(harness.packed(name, lambda _, w: ops.dequantize(w)) for name in FORMATS),
    harness.Candidate("torch_bf16", "bf16", "f32", 0.02, torch.Tensor.bfloat16, lambda _, w: w.float()),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(4096, 4096)], [1]))
def test_dequantize(benchmark, case, candidate):
    harness.run_benchmark(benchmark, harness.DEQUANTIZE, case, candidate)


if __name__ == "__main__":
    harness.main(harness.DEQUANTIZE, CANDIDATES, "4096x4096,1536x576", "1", "torch_bf16")
