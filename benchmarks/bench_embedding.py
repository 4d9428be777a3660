"""``embedding`` against torch: ``python -m benchmarks.bench_embedding --help``."""

import sys
from pathlib import Path

import pytest
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import ops

FORMATS = ["int8-row", "int8-g32", "int4a-g32"]
CANDIDATES = [
    *(harness.packed(name, ops.embedding) for name in FORMATS),
    harness.Candidate("torch_f32", "f32", "f32", 1e-6, lambda w: w, F.embedding),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(49152, 576)], [1, 512]))
def test_embedding(benchmark, case, candidate):
    harness.run_benchmark(benchmark, harness.EMBEDDING, case, candidate)


if __name__ == "__main__":
    harness.main(harness.EMBEDDING, CANDIDATES, "49152x576", "1,64,512", "torch_f32")
