"""Timing of operations: cold weights, interleaved rivals, the machine's limits in the same run.

A candidate's turn begins when no thread of the process is busy any more (pools of threads spin for
a while after their work), and with calls that are not timed, all on one copy of the weights: they
wake the candidate's threads, as the layers before do in a model, and give the system time to spread
them over the CPUs (a worker woken on its caller's CPU waits there for milliseconds).  The next call
is timed, alone, on the next of the candidate's other copies; before a copy's turn comes again, all
copies of all candidates have been read, which together are larger than the largest cache twice: what
is read comes from memory, as in a model.  Reported is the median.  Limits are measured in the same process, before.

Nothing is timed that computes something wrong: each candidate's result is first compared with the
float product, and the error that it has is reported.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import memlm
from memlm import limits
from memlm.formats import Format, Packed

ROUNDS, SECONDS = 9, 0.5  # timed calls of each candidate: at least; and for about so long in all
COLD = 2  # all copies of all weights together are larger than so many times the largest cache
# No thread is busy when the process takes less than a tenth of SETTLE seconds in so long (the
# kernel counts in steps of up to 10 ms); after PATIENCE times that, threads are taken to spin for
# good.
SETTLE, PATIENCE = 0.01, 50
# Seconds of untimed calls: some ticks of the scheduler, at 4 to 10 ms each, which spreads threads.
WAKE = 0.025

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

out = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """One problem with ``W [n, k]`` and an x of m rows."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}, m={self.m}"

    def weights(self) -> torch.Tensor:
        """f32 [n, k]; the same tensor for every m."""
        return _weights(self.n, self.k)


@dataclass(frozen=True)
class Operation:
    """What is computed: x for a case, the result for float ``w`` in f64, multiply-adds, and the
    share of the stored bytes that a call reads."""

    name: str
    x: Callable[[Case], torch.Tensor]
    exact: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    macs: Callable[[Case], int]
    share: Callable[[Case], float]


MATMULS = {
    name: Operation(
        name,
        x=lambda case: torch.randn(case.m, case.k),
        exact=lambda x, w: x.double() @ w.double().T,
        macs=lambda case: case.m * case.n * case.k,
        share=lambda case: 1.0,
    )
    for name in (
        "w2_matmul", "w4_matmul", "w8_matmul", "w8a8_matmul", "block_sparse_matmul", "w4_sparse_matmul"
    )
}
EMBEDDING = Operation(
    "embedding",
    x=lambda case: torch.randint(case.n, (case.m,)),
    exact=lambda ids, w: w.double()[ids],
    macs=lambda case: case.m * case.k,
    share=lambda case: case.m / case.n,
)
# The matrix is not a weight here but the activations: n rows of k.
QUANTIZE_ROWS = Operation(
    "quantize_rows",
    x=lambda case: torch.empty(0),
    exact=lambda _, x: x.double(),
    macs=lambda case: case.n * case.k,
    share=lambda case: 1.0,
)
DEQUANTIZE = Operation(
    "dequantize",
    x=lambda case: torch.empty(0),
    exact=lambda _, w: w.double(),
    macs=lambda case: case.n * case.k,
    share=lambda case: 1.0,
)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    prepare(w) makes of the float ``w [n, k]`` what is stored, run(x, stored) computes, both with
    ``torch.get_num_threads()`` threads.  What is stored is copied with ``copy.deepcopy`` and is a
    tuple of tensors or has ``nbytes``, the bytes of the weights that a call reads.
    ``arithmetic``: ``"f32"`` or ``"i8"``, whose limit counts for it.  ``error``: the relative error
    (Frobenius norm) against the float result beyond which it counts as wrong.  ``version``: of the
    library that computes, with its name.
    """

    impl: str
    format: str
    arithmetic: str
    error: float
    prepare: Callable[[torch.Tensor], Any]
    run: Callable[[torch.Tensor, Any], torch.Tensor]
    dtype: torch.dtype = torch.float32  # of a float x
    version: str = f"torch {torch.__version__}"
    value: Callable[[Any], torch.Tensor] = lambda result: result  # the numbers that a result stands for


# Relative error of random weights after rounding: to 4 bits about 0.1, to 8 bits 0.01; a result that
# is wrong is off by about 1.
ROUNDING = {2: 0.6, 4: 0.2, 8: 0.03}


@functools.lru_cache(maxsize=4)
def quantized(w: torch.Tensor, format: Format) -> Packed:
    """``w`` rounded by memlm; kept, for several candidates and cases ask for the same."""
    return memlm.quantize_weight(w, format)


def packed(
    name: str,
    run: Callable[[torch.Tensor, Packed], torch.Tensor],
    impl: str = "memlm",
    arithmetic: str = "f32",
) -> Candidate:
    """memlm's candidate for the format ``name``."""
    format = Format.parse(name)
    return Candidate(
        impl,
        format.name,
        arithmetic,
        ROUNDING[format.bits],
        lambda w: copy.deepcopy(quantized(w, format)),
        run,
        version=f"memlm {memlm.__version__}",
    )


@dataclass
class Sized:
    """A stored weight that does not tell its size itself."""

    value: Any
    nbytes: int


@dataclass(frozen=True)
class Measurement:
    """One line of the results.  ``us``: median microseconds of a call; ``weight_bytes``: what one
    call reads of the weights; ``limit_gbps``: bytes from memory, 10^9 per second; ``limit_gops``:
    multiply-adds of the candidate's arithmetic, 10^9 per second, both as measured in this run;
    ``error``: relative (Frobenius norm) against the float result in f64; ``version``: of the
    library that ran, with its name; ``date``: when the run began, UTC.  Lines written before
    there were such fields have none of the last three."""

    op: str
    impl: str
    format: str
    m: int
    n: int
    k: int
    threads: int
    us: float
    weight_bytes: int
    limit_gbps: float
    limit_gops: float
    macs: int
    arithmetic: str
    isa: str
    device: str
    memlm: str
    torch: str
    commit: str
    error: float | None = None
    version: str = ""
    date: str = ""

    @property
    def gbps(self) -> float:
        return self.weight_bytes / self.us / 1e3

    @property
    def gops(self) -> float:
        return self.macs / self.us / 1e3

    @property
    def of_limit(self) -> float:
        """Time that the nearer limit would take, as a share of the time it took."""
        return max(self.gbps / self.limit_gbps, self.gops / self.limit_gops)


def stored_bytes(stored) -> int:
    """Bytes of what ``prepare`` made."""
    return sum(part.nbytes for part in stored) if isinstance(stored, tuple) else stored.nbytes


class _Runner:
    """A candidate, checked, with its copies of the weights.

    Raises AssertionError where its result is wrong.
    """

    def __init__(self, candidate: Candidate, x: torch.Tensor, w: torch.Tensor, exact: torch.Tensor):
        self.candidate = candidate
        self.x = x.to(candidate.dtype) if x.is_floating_point() else x
        self.copies = [candidate.prepare(w)]
        self.size = stored_bytes(self.copies[0])
        result = candidate.value(candidate.run(self.x, self.copies[0])).double()
        self.error = float((result - exact).norm() / exact.norm())
        if not self.error < candidate.error:
            raise AssertionError(
                f"{candidate.impl} {candidate.format}: relative error {self.error:.3g}, "
                f"expected below {candidate.error}"
            )
        self.calls, self.times = 0, []

    def call(self) -> float:
        """Seconds of one call, on the next copy but the first."""
        stored = self.copies[1 + self.calls % (len(self.copies) - 1)]
        self.calls += 1
        start = time.perf_counter()
        self.candidate.run(self.x, stored)
        return time.perf_counter() - start

    def turn(self) -> None:
        _settle()
        start = time.perf_counter()
        while True:
            self.candidate.run(self.x, self.copies[0])
            if time.perf_counter() - start > WAKE:
                break
        self.times.append(self.call())


def _settle() -> None:
    """Waits until no thread of this process is busy."""
    for _ in range(PATIENCE):
        before = time.process_time()
        time.sleep(SETTLE)
        if time.process_time() - before <= SETTLE / 10:
            return


def _cool(runners: list[_Runner]) -> None:
    """Gives each runner as many copies as keep all of them cold, and calls each of them once: what
    a first call does belongs to no measurement."""
    copies = 1 + COLD * limits.cache_bytes() // sum(runner.size for runner in runners)
    for runner in runners:
        runner.copies += (copy.deepcopy(runner.copies[0]) for _ in range(copies))
        for _ in runner.copies[1:]:
            runner.call()


def _keep_memory() -> None:
    """Has glibc's malloc keep what is freed.

    Otherwise each large result is made of new pages, which takes as long as the product, and only
    from those candidates that have no memory of their own for results.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure(
    operation: Operation,
    cases: Iterable[Case],
    candidates: list[Candidate],
    threads: list[int],
    rounds: int | None = None,
) -> list[Measurement]:
    """Times every candidate on every case with every number of threads, in so many rounds; None: as
    many as give good medians.

    A rival that refuses a case is left out, with a message.  Raises AssertionError for a result
    that is wrong.
    """
    _keep_memory()
    cases, results, before = list(cases), [], torch.get_num_threads()
    about = run() | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with Progress(console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(operation.name, total=len(threads) * len(cases))
        for count in threads:
            torch.set_num_threads(count)
            limit = limits.measure(count)
            for case in cases:
                progress.update(task, description=f"{operation.name} {case}, {count} threads")
                for runner in _time(operation, case, candidates, rounds):
                    c = runner.candidate
                    gops = limit.f32_gmacs if c.arithmetic == "f32" else limit.i8_gmacs
                    results.append(
                        Measurement(
                            operation.name, c.impl, c.format, case.m, case.n, case.k, count,
                            statistics.median(runner.times) * 1e6,
                            round(runner.size * operation.share(case)), limit.dram_gbps, gops,
                            operation.macs(case), c.arithmetic, error=runner.error,
                            version=c.version, **about,
                        )  # fmt: skip
                    )
                progress.advance(task)
    torch.set_num_threads(before)
    return results


@functools.lru_cache(maxsize=1)
def _weights(n: int, k: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k)


def _time(
    operation: Operation, case: Case, candidates: list[Candidate], wanted: int | None
) -> list[_Runner]:
    w = case.weights()
    torch.manual_seed(1)
    x = operation.x(case)
    exact = operation.exact(x, w)
    runners = []
    for candidate in candidates:
        try:
            runners.append(_Runner(candidate, x, w, exact))
        except RuntimeError as error:
            if candidate.impl.startswith("memlm"):
                raise
            name, reason = f"{candidate.impl} {candidate.format}", str(error).splitlines()[0]
            out.print(f"{name}: not for {case}: {reason}")
    if not runners:
        return []
    _cool(runners)
    start = time.perf_counter()
    rounds = 0
    seconds = 0 if wanted else SECONDS * len(runners)
    while rounds < (wanted or ROUNDS) or time.perf_counter() - start < seconds:
        for runner in runners:
            runner.turn()
        rounds += 1
    return runners


def commit() -> str:
    """The commit that is measured, with a + where files differ from it; "unknown" elsewhere."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def run() -> dict[str, str]:
    """What a measurement depends on besides its case."""
    return {
        "isa": memlm.isa(),
        "device": limits.cpu_name(),
        "memlm": memlm.__version__,
        "torch": torch.__version__,
        "commit": commit(),
    }


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Puts text in place of what a page has between two marks."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}{text}{end}{rest.partition(end)[2]}")


def table(results: list[Measurement], baseline: str) -> Table:
    """Results with the times relative to ``baseline``'s on the same case."""
    base = {(r.m, r.n, r.k, r.threads): r.us for r in results if r.impl == baseline}
    shown = Table(title=f"{results[0].op}, {results[0].device}, {results[0].isa}")
    for heading in ("W", "m", "threads", "impl", "format"):
        shown.add_column(heading, justify="left" if heading in ("impl", "format") else "right")
    for heading in ("us", "GB/s", "GMAC/s", "of limit", f"{baseline} / this"):
        shown.add_column(heading, justify="right")
    last = None
    for r in results:
        case = (r.m, r.n, r.k, r.threads)
        if last not in (None, case):
            shown.add_section()
        last = case
        ratio = f"{base[case] / r.us:.2f}" if case in base else ""
        shown.add_row(
            f"{r.n}x{r.k}", str(r.m), str(r.threads), r.impl, r.format, f"{r.us:,.0f}",
            f"{r.gbps:.1f}", f"{r.gops:.1f}", f"{r.of_limit:.0%}", ratio,
        )  # fmt: skip
    return shown


def write_lines(results: list[Measurement], path: Path) -> None:
    """Appends one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(r)) + "\n" for r in results)


def default_results() -> Path:
    """benchmarks/results/<device>.jsonl"""
    name = "".join(c if c.isalnum() else "-" for c in limits.cpu_name()).strip("-").lower()
    return Path(__file__).parent / "results" / f"{name}-{platform.machine()}.jsonl"


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1")
    return values


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        n, _, k = part.partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise argparse.ArgumentTypeError(f"{part!r}: expected NxK, such as 4096x4096")
        shapes.append((int(n), int(k)))
    return shapes


def main(
    operation: Operation,
    candidates: list[Candidate],
    shapes: str,
    ms: str,
    baseline: str,
    arguments: list[str] | None = None,
) -> list[Measurement]:
    """The command line of a benchmark."""
    impls = list(dict.fromkeys(c.impl for c in candidates))
    formats = list(dict.fromkeys(c.format for c in candidates))
    parser = argparse.ArgumentParser(
        prog=f"bench_{operation.name}",
        description=f"Times {operation.name}; cold weights, interleaved, medians.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one line per measurement")
    parser.add_argument("--record", action="store_true", help=f"append to {default_results().name}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the roofline")
    parser.add_argument("--shapes", type=_shapes, default=shapes, help="NxK,... (%(default)s)")
    parser.add_argument("--ms", type=_numbers, default=ms, help="rows of x (%(default)s)")
    parser.add_argument("--impls", default=",".join(impls), help="%(default)s")
    parser.add_argument("--formats", default=",".join(formats), help="%(default)s")
    parser.add_argument("--threads", type=_numbers, default=str(torch.get_num_threads()))
    options = parser.parse_args(arguments)
    for name, known in (("impls", impls), ("formats", formats)):
        wanted = getattr(options, name).split(",")
        if unknown := set(wanted) - set(known):
            parser.error(f"--{name}: {sorted(unknown)} not known; known are {', '.join(known)}")
        candidates = [c for c in candidates if getattr(c, name[:-1]) in wanted]
    if not candidates:
        parser.error("--impls and --formats leave nothing to measure")
    cases = [Case(m, n, k) for n, k in options.shapes for m in options.ms]
    with torch.inference_mode():
        results = measure(operation, cases, candidates, options.threads)
    Console(width=None if sys.stdout.isatty() else 120).print(table(results, baseline))
    if options.json:
        write_lines(results, options.json)
    if options.record:
        write_lines(results, default_results())
    if options.plot:
        from .plots import roofline

        roofline(results, options.plot)
    return results


def pytest_cases(candidates: list[Candidate], shapes: list[tuple[int, int]], ms: list[int]):
    """(case, candidate) pairs and their names, for ``pytest.mark.parametrize``."""
    pairs = [(Case(m, n, k), c) for n, k in shapes for m in ms for c in candidates]
    return {
        "argnames": "case, candidate",
        "argvalues": pairs,
        "ids": [f"{case.n}x{case.k}-m{case.m}-{c.impl}-{c.format}" for case, c in pairs],
    }


def run_benchmark(benchmark, operation: Operation, case: Case, candidate: Candidate) -> None:
    """One entry of pytest-benchmark, with cold weights."""
    w, x = case.weights(), operation.x(case)
    with torch.inference_mode():
        runner = _Runner(candidate, x, w, operation.exact(x, w))
        _cool([runner])
        benchmark(runner.call)
    weight_bytes = round(runner.size * operation.share(case))
    benchmark.extra_info.update(m=case.m, n=case.n, k=case.k, weight_bytes=weight_bytes)
