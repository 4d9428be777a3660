"""The page of results, docs/results.md with its pictures, from what the benchmarks have recorded:
``python -m benchmarks.page``.

It shows the newest run of each operation on each device.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from . import plots
from .harness import Measurement

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {field.name for field in fields(Measurement)}
HEAD = """# Results

Written by `python -m benchmarks.page` from [benchmarks/results](../benchmarks/results): the newest
run of each operation on each device. Times are medians in microseconds; weights are cold, the
candidates of a table ran by turns in one process, and the limits were measured in it as well
([harness.py](../benchmarks/harness.py)). In brackets: the time over that of memlm's first row; the
fastest of a column is bold. *Error* is relative to the f64 product of the weights before rounding
(Frobenius norm); that of weights alone rounded to the format is most of it.
"""


def read(folder: Path) -> list[Measurement]:
    """All measurements in a folder's ``.jsonl`` files; of fields that this version does not know
    nothing is kept."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found.append(Measurement(**{k: v for k, v in json.loads(line).items() if k in KNOWN}))
    return found


def newest(results: Iterable[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """(device, operation) -> the measurements of its newest run: the last that was written."""
    runs = {}
    for r in results:
        last = runs.setdefault((r.device, r.op), [])
        if last and (last[-1].date, last[-1].commit) != (r.date, r.commit):
            last.clear()
        last.append(r)
    return runs


def _reference(run: list[Measurement]) -> tuple[str, str] | None:
    """memlm's first candidate, with which the others are compared."""
    return next(((r.impl, r.format) for r in run if r.impl == "memlm"), None)


def _about(run: list[Measurement]) -> str:
    first = run[0]
    when = f"{first.date[:16].replace('T', ' ')} UTC" if first.date else "date not recorded"
    limits = []
    for threads in dict.fromkeys(r.threads for r in run):
        rows = [r for r in run if r.threads == threads]
        roofs = sorted({r.arithmetic: r.limit_gops for r in rows}.items())
        limits.append(
            f"{threads} threads: memory {rows[0].limit_gbps:.1f} GB/s, "
            + ", ".join(f"{name} {roof:.0f} GMAC/s" for name, roof in roofs)
        )
    versions = dict.fromkeys(
        [f"memlm {first.memlm}", f"torch {first.torch}", *(r.version for r in run if r.version)]
    )
    return (
        f"{when}, commit {first.commit}, kernels for {first.isa}. "
        f"Limits: {'; '.join(limits)}. Versions: {', '.join(versions)}.\n"
    )


def _table(rows: list[Measurement], reference: tuple[str, str] | None) -> str:
    """One line for each candidate, one column for each m."""
    ms = sorted({r.m for r in rows})
    by_name: dict[tuple[str, str], dict[int, Measurement]] = {}
    for r in rows:
        by_name.setdefault((r.impl, r.format), {})[r.m] = r
    base = by_name.get(reference, {})
    fastest = {m: min(r.us for r in rows if r.m == m) for m in ms}

    def cell(r: Measurement | None) -> str:
        if r is None:
            return ""
        text = f"{r.us:,.0f}" if r.us >= 100 else f"{r.us:.1f}"
        if r.us == fastest[r.m]:
            text = f"**{text}**"
        return f"{text} ({r.us / base[r.m].us:.2f})" if r.m in base else text

    lines = [
        "| | format | bits per weight | error | " + " | ".join(f"m={m}" for m in ms) + " |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(ms),
    ]
    for (impl, format), measured in by_name.items():
        last = measured[max(measured)]  # the most rows: the best estimate of the error
        error = "" if last.error is None else f"{last.error:.2g}"
        cells = " | ".join(cell(measured.get(m)) for m in ms)
        # Other operations do not read all of W.
        whole = last.op.endswith("_matmul")
        bits = f"{8 * last.weight_bytes / (last.n * last.k):.2f}" if whole else ""
        lines.append(f"| {impl} | {format} | {bits} | {error} | {cells} |")
    return "\n".join(lines) + "\n"


def write(results: list[Measurement], page: Path) -> None:
    """Writes the page, and its pictures into the folder of its name beside it."""
    parts = [HEAD]
    device = None
    for (name, op), run in sorted(newest(results).items()):
        if name != device:
            parts.append(f"## {name}\n")
            device = name
        parts += [f"### {op}\n", _about(run)]
        reference = _reference(run)
        if op.endswith("_matmul") and reference:
            slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
            folder = page.with_suffix("")
            pictures = {what: folder / f"{slug}-{op}-{what}.png" for what in ("ratios", "roofline")}
            plots.ratios(run, reference, pictures["ratios"])
            plots.roofline(run, pictures["roofline"])
            for what, picture in pictures.items():
                parts.append(f"![{op}, {what}]({folder.name}/{picture.name})\n")
        for n, k, threads in dict.fromkeys((r.n, r.k, r.threads) for r in run):
            rows = [r for r in run if (r.n, r.k, r.threads) == (n, k, threads)]
            parts += [f"W {n}x{k}, {threads} threads:\n", _table(rows, reference)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(parts), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="page", description="Writes the page of results.")
    folder = ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=Path, default=folder, help="folder of .jsonl files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args(arguments)
    results = read(options.results)
    if not results:
        parser.error(f"--results: no measurements in {options.results}")
    write(results, options.page)


if __name__ == "__main__":
    main()
