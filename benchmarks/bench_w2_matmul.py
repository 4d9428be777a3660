"""``w2_matmul`` against torch's float matmul: ``python -m benchmarks.bench_w2_matmul --help``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness, matmul

OPERATION = harness.MATMULS["w2_matmul"]
FORMATS = ["int2a-g32", "ternary-g128"]
CANDIDATES = [*matmul.memlm_candidates(FORMATS), *matmul.torch_float()]


@pytest.mark.parametrize(
    **harness.pytest_cases(CANDIDATES, matmul.PYTEST_SHAPES, matmul.PYTEST_MS)
)
def test_w2_matmul(benchmark, case, candidate):
    harness.run_benchmark(benchmark, OPERATION, case, candidate)


if __name__ == "__main__":
    harness.main(OPERATION, CANDIDATES, matmul.SHAPES, matmul.MS, matmul.BASELINE)
