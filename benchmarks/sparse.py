"""What the benchmarks of sparse matrices share: cases, lines of results, docs/sparse.md.

A sparse candidate is compared with the dense one over the same weights, zeros and all, in the same
run: what it must reach is a ratio of times, and of bytes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import memlm
from memlm import ops
from memlm.quantize import sparse_quantize
from memlm.sparse_formats import SparseFormat, SparsePacked

from . import harness, plots
from .harness import ROUNDING, Candidate, Measurement

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "sparse.md", ROOT / "benchmarks" / "results" / "sparse.json"
SHAPES, MS = "4096x4096,2048x2048", "1,32,512"


@dataclass(frozen=True)
class Case(harness.Case):
    """A W of which ``density`` is stored, in ``pattern``."""

    pattern: str
    density: float

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.density:.0%} {self.pattern}"

    def weights(self) -> torch.Tensor:
        return _weights(self.n, self.k, self.pattern, self.density)


@functools.lru_cache(maxsize=1)
def _weights(n: int, k: int, pattern: str, density: float) -> torch.Tensor:
    torch.manual_seed(0)
    w = torch.randn(n, k)
    if pattern == "block":  # exactly so many of the blocks, anywhere
        blocks = torch.randperm(math.ceil(n / 16) * math.ceil(k / 32)).view(math.ceil(n / 16), -1)
        kept = blocks < round(density * blocks.numel())
        kept = kept.repeat_interleave(16, dim=0).repeat_interleave(32, dim=1)[:n, :k]
    elif pattern == "2:4":
        kept = torch.rand(n, math.ceil(k / 4), 4).argsort(2).flatten(1)[:, :k] < 2
    else:
        kept = torch.rand(n, k) < density
    return w * kept


@functools.lru_cache(maxsize=4)
def _packed(w: torch.Tensor, format: SparseFormat) -> SparsePacked:
    return sparse_quantize(w, format)


def candidate(name: str) -> Candidate:
    """memlm's over a sparse matrix, in fast mode; in bf16 where its values are."""
    format = SparseFormat.parse(name)
    return Candidate(
        "memlm",
        format.name,
        "f32" if format.is_float else "i8",
        0.02 if format.is_float else ROUNDING[format.bits],
        lambda w: copy.deepcopy(_packed(w, format)),
        lambda x, packed: ops.matmul(x, packed, mode="fast"),
        torch.bfloat16 if format.values == "bf16" else torch.float32,
        version=f"memlm {memlm.__version__}",
    )


@dataclass(frozen=True)
class Goal:
    """The sparse ``format`` beside the dense candidate (``impl``, ``dense``); ``time`` and ``bytes``:
    of a case, the largest ratio that is wanted, or None."""

    format: str
    impl: str
    dense: str
    time: Callable[[Case], float | None]
    bytes: Callable[[Case], float | None]


@dataclass(frozen=True)
class Line:
    """One case of one format.  Times in microseconds, medians."""

    op: str
    format: str
    dense: str
    m: int
    n: int
    k: int
    density: float
    us: float
    dense_us: float
    bytes: int
    dense_bytes: int
    most_time: float | None
    most_bytes: float | None
    threads: int
    limit_gbps: float
    isa: str
    device: str
    memlm: str
    torch: str
    commit: str

    @property
    def time_ratio(self) -> float:
        return self.us / self.dense_us

    @property
    def bytes_ratio(self) -> float:
        return self.bytes / self.dense_bytes


def by_case(results: list[Measurement]) -> dict[tuple, dict[tuple[str, str], Measurement]]:
    """(m, n, k) -> (impl, format) -> measurement."""
    found = {}
    for r in results:
        found.setdefault((r.m, r.n, r.k), {})[r.impl, r.format] = r
    return found


def measure(
    operation: harness.Operation, cases: list[Case], goals: list[Goal], dense: list[Candidate]
) -> list[Line]:
    """Every goal on every case, of one pattern and density."""
    candidates = [*dense, *(candidate(goal.format) for goal in goals)]
    results = harness.measure(operation, cases, candidates, [torch.get_num_threads()])
    found, lines = by_case(results), []
    for goal in goals:
        for case in cases:
            of_case = found[case.m, case.n, case.k]
            ours, theirs = of_case["memlm", goal.format], of_case[goal.impl, goal.dense]
            about = ("threads", "limit_gbps", "isa", "device", "memlm", "torch", "commit")
            lines.append(
                Line(
                    operation.name, goal.format, f"{goal.impl} {goal.dense}", case.m, case.n, case.k,
                    case.density, ours.us, theirs.us, ours.weight_bytes, theirs.weight_bytes,
                    goal.time(case), goal.bytes(case), **{name: getattr(ours, name) for name in about},
                )  # fmt: skip
            )
    return lines


def arguments(name: str) -> argparse.ArgumentParser:
    """The command line that these benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"bench_{name}", description=f"Times {name}.")
    parser.add_argument("--record", action="store_true", help=f"write {PAGE.name} and the results")
    parser.add_argument("--shapes", type=harness._shapes, default=SHAPES, help="NxK,... (%(default)s)")
    parser.add_argument("--ms", type=harness._numbers, default=MS, help="rows of x (%(default)s)")
    return parser


def show(lines: list[Line]) -> None:
    table = Table(title=f"{lines[0].op}, {lines[0].device}, {lines[0].isa}, {lines[0].threads} threads")
    for heading in ("format", "W", "stored", "m", "us", "dense, us", "time", "at most", "bytes", "at most"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for r in lines:
        most = [f"{x:.2f}" if x else "" for x in (r.most_time, r.most_bytes)]
        table.add_row(
            r.format, f"{r.n}x{r.k}", f"{r.density:.0%}", str(r.m), f"{r.us:,.0f}", f"{r.dense_us:,.0f}",
            f"{r.time_ratio:.3f}", most[0], f"{r.bytes_ratio:.3f}", most[1],
        )  # fmt: skip
    Console(width=120).print(table)


def record(op: str, lines: list[Line], rivals: str = "") -> None:
    """Puts the lines of one operation, and the text about its rivals, into docs/sparse.md and its
    picture, and into benchmarks/results."""
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    recorded[op] = [asdict(line) for line in lines]
    RESULTS.write_text(json.dumps(recorded, indent=1) + "\n")
    marks = (f"<!-- {op} -->\n", f"<!-- end of {op} -->\n")
    harness.put_between(PAGE, *marks, text(lines) + rivals)
    found = [Line(**line) for one in recorded.values() for line in one]
    plots.sparse(found, PAGE.with_suffix(".png"))


def text(lines: list[Line]) -> str:
    """The table of one operation: a row for each format, shape and density."""
    first, ms = lines[0], sorted({line.m for line in lines})
    heads = [f"m={m} | at most" for m in ms]
    parts = [
        f"{first.device} ({first.isa}), {first.threads} threads, torch {first.torch}, commit "
        f"{first.commit}; memory gives {first.limit_gbps:.0f} GB/s in the same run.\n\n",
        f"| format | dense | W | stored | {' | '.join(heads)} | bytes | at most |\n",
        f"| --- | --- | --- | ---: |{' ---: | ---: |' * (len(ms) + 1)}\n",
    ]
    rows: dict[tuple, dict[int, Line]] = {}
    for line in lines:
        rows.setdefault((line.format, line.n, line.k, line.density), {})[line.m] = line
    for (format, n, k, density), row in rows.items():
        any_m = next(iter(row.values()))
        cells = [format, any_m.dense, f"{n}x{k}", f"{density:.0%}"]
        for m in ms:
            r = row[m]
            cells += [f"{cell(r.time_ratio, r.most_time)} ({r.us:,.0f} us)", most(r.most_time)]
        cells += [cell(any_m.bytes_ratio, any_m.most_bytes), most(any_m.most_bytes)]
        parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def cell(ratio: float, most: float | None) -> str:
    """Bold where it is small enough."""
    return f"**{ratio:.2f}**" if most is not None and ratio <= most else f"{ratio:.2f}"


def most(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
