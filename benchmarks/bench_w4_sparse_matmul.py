"""``w4_sparse_matmul`` against the dense product of the same weights:
``python -m benchmarks.bench_w4_sparse_matmul --help``."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness, matmul, sparse
from benchmarks.sparse import Case, Goal

OPERATION = harness.MATMULS["w4_sparse_matmul"]
PATTERNS = [("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.3)]
GROUPS = ["int4-g32", "int4-g128"]
DENSE = [c for c in matmul.memlm_candidates(GROUPS) if c.impl == "memlm"]


def _time(case: Case) -> float | None:
    """Half of the weights: decoding no slower than with all; 30 %: faster."""
    return 1.0 if case.m == 1 else None


def main(arguments: list[str] | None = None) -> None:
    given = sparse.arguments(OPERATION.name).parse_args(arguments)
    lines = []
    with torch.inference_mode():
        for pattern, density in PATTERNS:
            cases = [Case(m, n, k, pattern, density) for n, k in given.shapes for m in given.ms]
            goals = [Goal(f"{pattern}/{g}", "memlm", g, _time, lambda case: 1.0) for g in GROUPS]
            lines += sparse.measure(OPERATION, cases, goals, DENSE)
    sparse.show(lines)
    if given.record:
        sparse.record(OPERATION.name, lines)


if __name__ == "__main__":
    main()
