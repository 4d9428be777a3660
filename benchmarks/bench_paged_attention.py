"""``paged_attention``, one new token over a long context, against torch's attention: docs/attention.md.

    python -m benchmarks.bench_paged_attention [--record]

Every candidate by turns in one process, each call alone, on keys and values that are not in any cache
(benchmarks/harness.py); the median.  The limit is the time in which memory can be read, measured in the
same run, for the bytes that the keys and values have as they are stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import memlm
from benchmarks import harness
from memlm import kv_formats, limits, ops
from memlm.kv_formats import KvFormat

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = (ROOT / path for path in ("docs/attention.md", "benchmarks/results/paged_attention.json"))
HEADS, BLOCK = 32, 64
# Norm of the difference from the result of the keys and values unrounded, over that of the result.
ERROR = {"f32": 1e-5, "bf16": 0.02, "int8": 0.05, "int4": 0.3}


@dataclass(frozen=True)
class Case:
    context: int
    kv_heads: int
    dim: int

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[kv_heads, context, dim]"""
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.kv_heads, self.context, self.dim)
        return tuple(torch.randn(shape, generator=generator))

    def query(self) -> torch.Tensor:
        """[HEADS, dim]"""
        return torch.randn(HEADS, self.dim, generator=torch.Generator().manual_seed(1))

    def exact(self, kv) -> torch.Tensor:
        """In f64, head by head of keys."""
        results = []
        for q, k, v in zip(self.query().double().view(self.kv_heads, -1, self.dim), *kv):
            results.append((q @ k.double().T * self.dim**-0.5).softmax(-1) @ v.double())
        return torch.cat(results)


CASES = [Case(n, kv, dim) for n in (8192, 32768) for kv in (32, 4) for dim in (64, 128)]


def paged(type: str) -> harness.Candidate:
    def prepare(kv):
        k, v = (x.transpose(0, 1) for x in kv)
        count, heads, dim = k.shape
        format = KvFormat(type, BLOCK, dim)
        pool = torch.empty(heads, count // BLOCK, format.block_bytes, dtype=torch.uint8)
        tails = tail_of = None
        if format.tail:
            tails = torch.empty(heads, 1, format.tail.block_bytes, dtype=torch.uint8)
            tail_of = torch.zeros(1, dtype=torch.int32)
        table = torch.arange(count // BLOCK, dtype=torch.int32)[None]
        step = (torch.tensor([count]), table, tail_of, format.index, BLOCK)
        ops.kv_append(pool, tails, k, v, torch.tensor([0, count]), *step)
        return harness.Sized((pool, tails, torch.tensor([0, 1]), *step), pool.nbytes)

    def run(q, stored):
        return ops.paged_attention(q[None], *stored.value)[0]

    version = f"memlm {memlm.__version__}"
    return harness.Candidate("memlm", type, "f32", ERROR[type], prepare, run, version=version)


def dense(type: str, impl: str, shape: Callable[[torch.Tensor, int], torch.Tensor]) -> harness.Candidate:
    """torch's, over keys and values as one tensor each; the query shaped as ``[1, heads, n, dim]``."""
    dtype = kv_formats.FLOATS[type]

    def run(q, stored):
        k, v = stored
        y = F.scaled_dot_product_attention(shape(q, k.shape[1]), k, v, enable_gqa=impl == "torch")
        return y.reshape(q.shape)

    def prepare(kv):
        return tuple(x.to(dtype, copy=True)[None] for x in kv)

    return harness.Candidate(impl, type, "f32", ERROR[type], prepare, run, dtype)


CANDIDATES = [
    *(paged(type) for type in kv_formats.TYPES),
    *(dense(type, "torch", lambda q, _: q[None, :, None]) for type in kv_formats.FLOATS),
]
# The query heads that share keys, as rows of one: what a GQA call could do by itself.
GROUPED = [
    dense(type, "torch, grouped", lambda q, heads: q.view(1, heads, -1, q.shape[1]))
    for type in kv_formats.FLOATS
]


@dataclass(frozen=True)
class Measurement:
    """Of one case and implementation.  ``us``: median microseconds; ``kv_bytes``: as stored;
    ``limit_us``: in which memory is read, at ``limit_gbps`` (10^9 bytes per second)."""

    case: Case
    impl: str
    type: str
    us: float
    kv_bytes: int
    limit_us: float
    limit_gbps: float
    error: float
    threads: int
    isa: str
    device: str
    memlm: str
    torch: str
    commit: str


def measure(case: Case, rounds: int, threads: int) -> list[Measurement]:
    limit = limits.measure(threads).dram_gbps
    kv = case.keys_and_values()
    exact, q = case.exact(kv), case.query()
    candidates = CANDIDATES + (GROUPED if case.kv_heads < HEADS else [])
    runners = [harness._Runner(candidate, q, kv, exact) for candidate in candidates]
    harness._cool(runners)
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < harness.SECONDS * len(runners):
        for runner in runners:
            runner.turn()
        done += 1
    run, results = harness.run(), []
    for r in runners:
        us, c = statistics.median(r.times) * 1e6, r.candidate
        sizes = (us, r.size, r.size / limit / 1e3, limit, r.error)
        results.append(Measurement(case, c.impl, c.format, *sizes, threads, **run))
    return results


HEAD = (
    "| context | KV heads | size | | stored as | us | KV, MB | of the bytes' time | torch / memlm |\n"
    "| ---: | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |\n"
)
BEGIN, END = "<!-- decode -->\n", "<!-- end of decode -->\n"


def rows(results: list[Measurement]) -> str:
    """Of one case; the last column compares with torch on numbers of f32, or of bf16 for bf16."""
    theirs = {r.type: r.us for r in results if r.impl == "torch"}
    lines = []
    for r in results:
        case = r.case
        ratio = f"{theirs.get(r.type, theirs['f32']) / r.us:.1f}" if r.impl == "memlm" else ""
        cells = [f"{case.context:,}", case.kv_heads, case.dim, r.impl, r.type, f"{r.us:,.0f}"]
        cells += [f"{r.kv_bytes / 1e6:,.1f}", f"{r.us / r.limit_us:.2f}", ratio]
        lines.append("| " + " | ".join(map(str, cells)) + " |\n")
    return "".join(lines)


def write(results: list[list[Measurement]]) -> None:
    """Puts the table into docs/attention.md, and all measurements into benchmarks/results."""
    first = results[0][0]
    where = (
        f"{first.device} ({first.isa}), {first.threads} threads, torch {first.torch}; memory reads "
        f"{first.limit_gbps:.0f} GB/s in the same run.\n\n"
    )
    harness.put_between(PAGE, BEGIN, END, where + HEAD + "".join(map(rows, results)))
    RESULTS.write_text(json.dumps([asdict(r) for case in results for r in case], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write docs/attention.md and the results")
    parser.add_argument("--rounds", type=int, default=harness.ROUNDS, help="timed calls (%(default)s)")
    parser.add_argument("--longest", type=int, default=32768, help="context (%(default)s)")
    given = parser.parse_args()
    harness._keep_memory()
    results = []
    print(HEAD, end="")
    for case in CASES:
        if case.context <= given.longest:
            results.append(measure(case, given.rounds, torch.get_num_threads()))
            print(rows(results[-1]), end="", flush=True)
            if given.record:
                write(results)


if __name__ == "__main__":
    main()
