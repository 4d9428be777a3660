"""Writes the account of the compiled Triton kernels into docs/gpu.md, between its marks:
``python -m tests.triton_code_table``.  Takes minutes: every kernel is compiled for every target."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import triton

from benchmarks import harness
from memlm.kernels._targets import TARGETS

from .build import ROOT
from .triton_code import Code, account

FILE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- begin: tests/triton_code_table.py -->\n", "<!-- end: tests/triton_code_table.py -->\n"


def span(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}–{max(values)}"


def cell(codes: list[Code]) -> str:
    """What all configurations of a kernel need on one target."""
    units = sorted({unit for code in codes for unit in code.matrix})
    shared = max(code.shared for code in codes) / 1024
    parts = [f"{span([code.registers for code in codes])} r", f"{shared:.0f} KB", *units]
    if spilled := max(code.spills if code.looped else 0 for code in codes):
        parts.append(f"**{spilled} spilled**")
    elif once := max(code.spills for code in codes):
        parts.append(f"{once} put aside")
    return ", ".join(parts)


def table(found: list[Code]) -> str:
    """One line for each kernel, one column for each target."""
    names = list(dict.fromkeys(code.kernel for code in found))
    targets = list(dict.fromkeys(code.target for code in found))
    head = ["kernel", "configurations", *targets]
    lines = [head, ["---"] * len(head)]
    for name in names:
        of_target = {t: [c for c in found if c.kernel == name and c.target == t] for t in targets}
        counts = span([len(codes) for codes in of_target.values() if codes])
        lines.append([f"`{name}`", counts, *(cell(codes) if codes else "–" for codes in of_target.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def loads(found: list[Code]) -> str:
    """Which kernels bring memory 16 bytes at a time, in every configuration for every NVIDIA target."""
    matmuls = sorted((c for c in found if TARGETS[c.target].backend == "cuda" and c.matrix), key=lambda c: c.kernel)
    narrow = [name for name, codes in groupby(matmuls, lambda c: c.kernel) if not all(c.wide for c in codes)]
    return f"all but {', '.join(f'`{name}`' for name in narrow)}" if narrow else "all"


def page(found: list[Code]) -> str:
    return f"""\
Compiled by Triton {triton.__version__}, each kernel in the configurations that a target has room for.  **r**:
registers of a thread (gfx: VGPRs), from the least to the most of them; then the most shared memory, and what
multiplies matrices; then bytes (gfx: registers) that are **spilled** in loops, or put aside before a loop and
fetched behind it.  Of the kernels with matrix instructions, {loads(found)} load 16 bytes at a time from
global memory on NVIDIA's.

{table(found)}"""


def main() -> None:
    """Targets may be named: sm_80 gfx942."""
    targets = sys.argv[1:] or list(TARGETS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [code for codes in pool.map(lambda target: account("", [target]), targets) for code in codes]
    if failed := [code for code in found if code.error]:
        sys.exit("\n".join(f"{code.kernel} {code.config} {code.target}: {code.error}" for code in failed))
    harness.put_between(FILE, BEGIN, END, page(found))


if __name__ == "__main__":
    main()
