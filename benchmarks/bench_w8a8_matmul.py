"""``w8a8_matmul`` against its rivals: ``python -m benchmarks.bench_w8a8_matmul --help``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness, matmul, rivals

OPERATION = harness.MATMULS["w8a8_matmul"]
CANDIDATES = [
    *matmul.memlm_w8a8(),
    *matmul.torch_float(),
    *matmul.torch_int8(),
    *rivals.candidates(8),
]


@pytest.mark.parametrize(
    **harness.pytest_cases(CANDIDATES, matmul.PYTEST_SHAPES, matmul.PYTEST_MS)
)
def test_w8a8_matmul(benchmark, case, candidate):
    harness.run_benchmark(benchmark, OPERATION, case, candidate)


if __name__ == "__main__":
    harness.main(OPERATION, CANDIDATES, matmul.SHAPES, matmul.MS, matmul.BASELINE)
