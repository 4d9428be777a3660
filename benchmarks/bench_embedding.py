"""``embedding`` against torch: ``python -m benchmarks.bench_embedding --help``."""

import pytest
import torch.nn.functional as F

from benchmarks import harness
from memlm import ops
from memlm.formats import Format
from memlm.quantize import quantize_weight

CANDIDATES = [
    *(
        harness.Candidate(
            "memlm",
            name,
            "f32",
            0.2 if Format.parse(name).bits == 4 else 0.03,
            lambda w, name=name: quantize_weight(w, name),
            ops.embedding,
        )
        for name in ("int8-row", "int8-g32", "int4a-g32")
    ),
    harness.Candidate("torch_f32", "f32", "f32", 1e-6, lambda w: w, F.embedding),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(49152, 576)], [1, 512]))
def test_embedding(benchmark, case, candidate):
    harness.run_benchmark(benchmark, harness.EMBEDDING, case, candidate)


if __name__ == "__main__":
    harness.main(harness.EMBEDDING, CANDIDATES, "49152x576", "1,64,512", "torch_f32")
