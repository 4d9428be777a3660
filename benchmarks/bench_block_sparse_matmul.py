"""``block_sparse_matmul`` against the dense products of the same weights, and against other
libraries' block-sparse ones: ``python -m benchmarks.bench_block_sparse_matmul --help``."""

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness, matmul, sparse
from benchmarks.harness import Candidate, Sized
from benchmarks.sparse import Case, Goal

OPERATION = harness.MATMULS["block_sparse_matmul"]
DENSITIES = [0.1, 0.3, 0.5, 0.7]


def _within(extra: float):
    return lambda case: case.density + extra


GOALS = [
    Goal("block/int4a-g32", "memlm", "int4a-g32", _within(0.08), _within(0.03)),
    Goal("block/int8-g32", "memlm", "int8-g32", _within(0.08), _within(0.03)),
    Goal("block/f32", "torch_f32", "f32", _within(0.1), _within(0.03)),
    Goal("block/bf16", "torch_bf16", "bf16", lambda case: None, _within(0.03)),
]
DENSE = [
    *(c for c in matmul.memlm_candidates(["int4a-g32", "int8-g32"]) if c.impl == "memlm"),
    *matmul.torch_float(),
]
# Their times are far from the others': few rounds suffice, and one takes seconds.
RIVAL_DENSITY, RIVAL_BLOCK, RIVAL_ROUNDS = 0.5, (16, 16), 3


class TorchBlocks(Sized):
    """A sparse tensor, which ``copy`` cannot copy."""

    def __deepcopy__(self, memo):
        return TorchBlocks(self.value.clone(), self.nbytes)


def rivals() -> list[Candidate]:
    """torch's and, where it is installed, SciPy's block-sparse rows, in f32."""

    def torch_blocks(w):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that such tensors are in beta
            stored = w.to_sparse_bsr(RIVAL_BLOCK)
        parts = (stored.values(), stored.col_indices(), stored.crow_indices())
        return TorchBlocks(stored, sum(part.nbytes for part in parts))

    found = [
        Candidate("torch_bsr", "f32", "f32", 1e-5, torch_blocks, lambda x, w: (w.value @ x.T).T)
    ]
    try:
        import scipy
        from scipy.sparse import bsr_matrix
    except ImportError as error:
        harness.out.print(f"scipy: left out ({error})")
        return found

    def scipy_blocks(w):
        stored = bsr_matrix(w.numpy(), blocksize=RIVAL_BLOCK)
        parts = (stored.data, stored.indices, stored.indptr)
        return Sized(stored, sum(part.nbytes for part in parts))

    def run(x, w):
        return torch.from_numpy((w.value @ x.numpy().T).T)

    version = f"scipy {scipy.__version__}"
    return [*found, Candidate("scipy_bsr", "f32", "f32", 1e-5, scipy_blocks, run, version=version)]


def rival_times(n: int, k: int, ms: list[int]) -> str:
    """A table of them, for the page."""
    cases = [Case(m, n, k, "block", RIVAL_DENSITY) for m in ms]
    dense = [c for c in DENSE if c.impl == "torch_f32"]
    candidates = [*dense, sparse.candidate("block/f32"), *rivals()]
    threads = [torch.get_num_threads()]
    results = harness.measure(OPERATION, cases, candidates, threads, RIVAL_ROUNDS)
    found = sparse.by_case(results)
    head = "".join(f" m={m} |" for m in ms)
    rows = [f"\nf32, {n}x{k}, {RIVAL_DENSITY:.0%} stored, milliseconds:\n\n| |{head}\n"]
    rows.append(f"| --- |{' ---: |' * len(ms)}\n")
    for c in candidates:
        name = f"memlm {c.format}" if c.impl == "memlm" else c.version
        name += {"torch_bsr": ", BSR", "scipy_bsr": ", BSR", "torch_f32": ", dense"}.get(c.impl, "")
        times = (found[m, n, k][c.impl, c.format].us / 1e3 for m in ms)
        rows.append(f"| {name} |{''.join(f' {ms_taken:,.1f} |' for ms_taken in times)}\n")
    return "".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = sparse.arguments(OPERATION.name)
    parser.add_argument(
        "--densities", type=float, nargs="+", default=DENSITIES, help="%(default)s"
    )
    parser.add_argument("--no-rivals", action="store_true", help="memlm and dense products only")
    given = parser.parse_args(arguments)
    lines = []
    with torch.inference_mode():
        for density in given.densities:
            cases = [Case(m, n, k, "block", density) for n, k in given.shapes for m in given.ms]
            lines += sparse.measure(OPERATION, cases, GOALS, DENSE)
        table = "" if given.no_rivals else rival_times(*given.shapes[0], given.ms)
    lines.sort(key=lambda line: ([g.format for g in GOALS].index(line.format), -line.n))
    sparse.show(lines)
    print(table)
    if given.record:
        sparse.record(OPERATION.name, lines, table)


if __name__ == "__main__":
    main()
