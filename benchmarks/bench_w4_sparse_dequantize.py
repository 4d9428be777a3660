"""``w4_sparse_dequantize`` beside ``dequantize``: ``python -m benchmarks.bench_w4_sparse_dequantize
--help``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import ops, quantize
from memlm.prune.scores import magnitude


def sparse(pattern: str) -> harness.Candidate:
    """Half of the weights, by magnitude."""

    def prepare(w):
        zeros = magnitude(w, 0.5, pattern, (16, 32))
        return quantize.sparse_quantize(w.masked_fill(zeros, 0), f"{pattern}/int4-g32")

    # What is left out is a third of a normal distribution's size.
    return harness.Candidate("memlm", f"{pattern}/int4-g32", "f32", 0.6, prepare, lambda _, w: ops.dequantize(w))


DENSE = harness.packed("int4-g32", lambda _, w: ops.dequantize(w), "memlm_dense")
CANDIDATES = [sparse("2:4"), sparse("unstructured"), DENSE]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(4096, 4096)], [1]))
def test_w4_sparse_dequantize(benchmark, case, candidate):
    harness.run_benchmark(benchmark, harness.DEQUANTIZE, case, candidate)


if __name__ == "__main__":
    harness.main(harness.DEQUANTIZE, CANDIDATES, "4096x4096,1536x576", "1", "memlm_dense")
