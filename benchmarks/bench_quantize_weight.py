"""``quantize_weight`` against a cast to bf16: ``python -m benchmarks.bench_quantize_weight --help``.

The bytes counted are those read, of the float matrix, and those written, of the result."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import formats, ops
from memlm.formats import Format

FORMATS = ["int4a-g32", "int4-g32", "nf4-g64", "int2a-g32", "int8-row", "int8-g32"]
QUANTIZE_WEIGHT = harness.Operation(
    "quantize_weight",
    x=lambda case: torch.empty(0),
    exact=lambda _, w: w.double(),
    macs=lambda case: case.n * case.k,
    share=lambda case: 1.0,
)


def candidate(name):
    format = Format.parse(name)
    return harness.Candidate(
        "memlm",
        name,
        "f32",
        harness.ROUNDING[format.bits],
        lambda w: harness.Sized(w, w.nbytes + harness.quantized(w, format).nbytes),
        lambda _, stored: ops.quantize_weight(stored.value, format, torch.float16),
        value=formats.dequantize,
    )


CANDIDATES = [
    *(candidate(name) for name in FORMATS),
    harness.Candidate(
        "torch_bf16",
        "bf16",
        "f32",
        0.02,
        lambda w: harness.Sized(w, w.nbytes + w.nbytes // 2),
        lambda _, stored: stored.value.bfloat16(),
    ),
]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(4096, 4096)], [1]))
def test_quantize_weight(benchmark, case, candidate):
    harness.run_benchmark(benchmark, QUANTIZE_WEIGHT, case, candidate)


if __name__ == "__main__":
    harness.main(QUANTIZE_WEIGHT, CANDIDATES, "4096x4096,1536x576", "1", "torch_bf16")
