"""``dequantize`` against a cast from bf16: ``python -m benchmarks.bench_dequantize --help``."""

import pytest
import torch

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
            lambda _, packed: ops.dequantize(packed),
        )
        for name in ("int4-g32", "int4a-g32", "int8-row", "int8-g32")
    ),
    harness.Candidate("torch_bf16", "bf16", "f32", 0.02, torch.Tensor.bfloat16, lambda _, w: w.float()),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(4096, 4096)], [1]))
def test_dequantize(benchmark, case, candidate):
    harness.run_benchmark(benchmark, harness.DEQUANTIZE, case, candidate)


if __name__ == "__main__":
    harness.main(harness.DEQUANTIZE, CANDIDATES, "4096x4096,1536x576", "1", "torch_bf16")
