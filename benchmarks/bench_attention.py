"""``attention`` over whole prompts, forward and backward, against torch's: docs/attention.md.

    python -m benchmarks.bench_attention [--record]

Times: both by turns in one process, each call alone after all threads have come to rest; the
median.  Peaks: a process of its own for each; by how much its resident memory grew over the inputs,
results included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import harness
from memlm import limits, memory, ops

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "attention.md", ROOT / "benchmarks" / "results" / "attention.json"
IMPLEMENTATIONS = {"memlm": ops.attention, "torch": F.scaled_dot_product_attention}
# Norm of the difference over that of the result, of two that compute the same.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02}
ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """Causal self-attention of one sequence; ``kv_heads`` heads of keys and values."""

    length: int
    dim: int
    heads: int
    kv_heads: int
    dtype: str

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of the result, laid out as models have them: by token."""
        torch.manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        made = (torch.randn(1, self.length, n, self.dim, dtype=self.torch_dtype) for n in heads)
        *qkv, grad = (x.transpose(1, 2) for x in made)
        return [*(x.requires_grad_() for x in qkv), grad]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def macs(self, backward: bool) -> int:
        """Multiply-adds; going back takes five products for the two of going forward."""
        pairs = self.length * (self.length + 1) // 2
        return pairs * self.dim * self.heads * (5 if backward else 2)

    def run(self, implementation: str, qkv: list[torch.Tensor]) -> torch.Tensor:
        shared = self.heads != self.kv_heads
        return IMPLEMENTATIONS[implementation](*qkv, is_causal=True, enable_gqa=shared)


CASES = [
    Case(length, dim, 32, kv_heads, dtype)
    for dtype, kv_heads in (("float32", 32), ("float32", 4), ("bfloat16", 32))
    for dim in (64, 128)
    for length in (1024, 2048, 4096, 8192)
]


@dataclass(frozen=True)
class Measurement:
    """Of one case, direction and implementation.  ``ms``: median; ``peak_mb``: MB (10^6)."""

    case: Case
    implementation: str
    backward: bool
    ms: float
    peak_mb: float
    threads: int
    limit_gmacs: float
    isa: str
    device: str
    memlm: str
    torch: str
    commit: str


def seconds(call) -> float:
    harness._settle()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], what: str) -> None:
    for a, b in zip(ours, theirs):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < ERROR[a.dtype], f"{what}: relative error {error:.2g}"


def medians(calls: dict, rounds: int) -> dict:
    """Seconds of each call, which take turns."""
    taken = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            taken[key].append(seconds(call))
    return {key: statistics.median(every) for key, every in taken.items()}


def times(case: Case, rounds: int) -> dict[tuple[str, bool], float]:
    """Median seconds by implementation and direction.

    Raises AssertionError where the two do not compute the same."""
    *qkv, grad = case.inputs()
    calls, results = {}, []
    for name in IMPLEMENTATIONS:
        out = case.run(name, qkv)
        calls[name, False] = torch.no_grad()(partial(case.run, name, qkv))
        calls[name, True] = partial(torch.autograd.grad, out, qkv, grad, retain_graph=True)
        results.append([out.detach(), *calls[name, True]()])
    assert_same(*results, str(case))
    return medians(calls, rounds)


def peak(case: Case, implementation: str, backward: bool, threads: int) -> float:
    """MB, measured in a fresh process."""
    arguments = [json.dumps(asdict(case)), implementation, str(int(backward))]
    command = [sys.executable, "-m", "benchmarks.bench_attention", "--worker", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip()}")
    return float(done.stdout)


def worker(case: str, implementation: str, backward: str) -> None:
    """Prints what :func:`peak` returns."""
    memory.return_freed()
    case, backward = Case(**json.loads(case)), bool(int(backward))

    def run(case: Case, inputs: list[torch.Tensor]) -> None:
        *qkv, grad = inputs
        with torch.set_grad_enabled(backward):
            out = case.run(implementation, qkv)
        if backward:
            torch.autograd.grad(out, qkv, grad)

    short = replace(case, length=64)
    run(short, short.inputs())  # all that a first call does
    inputs = case.inputs()
    memory.reset_peak()
    before = memory.resident_bytes()
    run(case, inputs)
    print((memory.peak_bytes() - before) / 1e6)


def measure(case: Case, rounds: int, threads: int, limit: float) -> list[Measurement]:
    run = harness.run()
    return [
        Measurement(
            case, name, backward, 1e3 * median, peak(case, name, backward, threads), threads, limit, **run
        )
        for (name, backward), median in times(case, rounds).items()
    ]


HEAD = (
    "| dtype | heads | size | tokens | forward, ms | torch | ratio | GMAC/s | MB | torch | "
    "backward, ms | torch | ratio | GMAC/s | MB | torch |\n| --- | --- |" + " ---: |" * 14 + "\n"
)
BEGIN, END = "<!-- prefill -->\n", "<!-- end of prefill -->\n"


def row(results: list[Measurement]) -> str:
    """Of one case."""
    case, found = results[0].case, {(r.implementation, r.backward): r for r in results}
    heads = f"{case.heads}" if case.heads == case.kv_heads else f"{case.heads} on {case.kv_heads}"
    cells = [case.dtype, heads, str(case.dim), f"{case.length:,}"]
    for backward in (False, True):
        ours, theirs = (found[name, backward] for name in IMPLEMENTATIONS)
        cells += [f"{ours.ms:,.0f}", f"{theirs.ms:,.0f}", f"**{theirs.ms / ours.ms:.2f}**"]
        cells += [f"{case.macs(backward) / ours.ms / 1e6:.0f}"]
        cells += [f"{ours.peak_mb:,.0f}", f"{theirs.peak_mb:,.0f}"]
    return "| " + " | ".join(cells) + " |"


def write(results: list[list[Measurement]]) -> None:
    """Puts the table into docs/attention.md, and all measurements into benchmarks/results."""
    first = results[0][0]
    where = (
        f"{first.device} ({first.isa}), {first.threads} threads, torch {first.torch}; f32 reaches "
        f"{first.limit_gmacs:.0f} GMAC/s in the same run.\n\n"
    )
    record(BEGIN, END, where + HEAD, map(row, results), RESULTS, results)


def record(begin: str, end: str, head: str, rows, path: Path, results: list[list]) -> None:
    """Puts a table between two marks of docs/attention.md, and all measurements into ``path``."""
    harness.put_between(PAGE, begin, end, head + "".join(f"{row}\n" for row in rows))
    path.write_text(json.dumps([asdict(r) for case in results for r in case], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--record", action="store_true", help="write docs/attention.md and the results"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="timed calls of each (%(default)s)"
    )
    parser.add_argument("--longest", type=int, default=8192, help="tokens (%(default)s)")
    parser.add_argument("--dtype", help="only this one")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(*given.worker)
    threads, results = torch.get_num_threads(), []
    limit = limits.measure(threads).f32_gmacs
    print(HEAD, end="")
    for case in CASES:
        if case.length <= given.longest and given.dtype in (None, case.dtype):
            results.append(measure(case, given.rounds, threads, limit))
            print(row(results[-1]), flush=True)
            if given.record:
                write(results)


if __name__ == "__main__":
    main()
