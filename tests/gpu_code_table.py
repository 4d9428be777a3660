"""Writes the account of the compiled CUDA kernels into docs/gpu.md, between its marks:
``python -m tests.gpu_code_table``.  Takes minutes: every kernel is compiled for every architecture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks import harness

from . import build, cubin, emulator, gpu_calls, gpu_limits, gpu_traffic

FILE = build.ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- begin: tests/gpu_code_table.py -->\n", "<!-- end: tests/gpu_code_table.py -->\n"


@dataclass(frozen=True)
class Row:
    """A kernel for one architecture, as its launcher starts it."""

    kernel: cubin.Kernel
    source: str
    launch: emulator.Launch

    @property
    def warps(self) -> int:
        """That a multiprocessor holds at once."""
        arch, launch = self.kernel.arch, self.launch
        shared = launch.shared_bytes + self.kernel.shared
        return gpu_limits.resident_warps(arch, self.kernel.registers, launch.threads, shared)

    @property
    def wide_loads(self) -> int:
        """Instructions that bring 16 bytes from global memory."""
        return self.kernel.count(r"(LDG|LDGSTS)\.E\..*128.*")


def launches(arch: int) -> dict[str, emulator.Launch]:
    """By kernel: how the launchers start it on a device of an architecture."""
    device = gpu_limits.ARCHS[arch]

    def run():
        for call in gpu_calls.all_calls(arch):
            try:
                call()
            except RuntimeError as error:  # the largest heads' tiles, on the smallest devices
                if "bytes of shared memory, the device has" not in str(error):
                    raise

    found = emulator.emulator().launches(run, 10 * arch, device.processors, device.block_shared)
    names = subprocess.run(["c++filt", "-p", *found], check=True, capture_output=True, text=True)
    return dict(zip(map(cubin.short, names.stdout.splitlines()), found.values()))


def rows(arch: int, sources: list[str] | None = None) -> list[Row]:
    """Every kernel of the sources that can be launched on an architecture."""
    started = launches(arch)
    found = []
    for source in sources or cubin.sources():
        for kernel in cubin.kernels(source, arch):
            if kernel.name in started:
                found.append(Row(kernel, source, started[kernel.name]))
            elif not gpu_calls.never(kernel.name, arch):
                raise LookupError(f"{kernel.name}: tests/gpu_calls.py has no call that launches it")
    return sorted(found, key=lambda row: (row.source, row.kernel.name))


def table(head: list[str], *lines: list[str]) -> str:
    out = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in out)


def code_table(of_arch: dict[int, list[Row]]) -> str:
    """One line for each kernel: what each architecture's code needs."""
    head = ["kernel", "threads", "shared KB", "tensor core", "16-byte loads"]
    head += [f"sm_{arch}" for arch in of_arch]
    by_name = {arch: {r.kernel.name: r for r in found} for arch, found in of_arch.items()}
    first = of_arch[80]
    lines = []
    for row in first:
        cells = []
        for arch in of_arch:
            here = by_name[arch].get(row.kernel.name)
            cells.append("–" if here is None else _cell(here))
        shared = (row.launch.shared_bytes + row.kernel.shared) / 1024
        unit = ", ".join(row.kernel.tensor_core()) or "–"
        code = f"`{row.kernel.name}`"
        lines.append([code, str(row.launch.threads), f"{shared:.1f}", unit, str(row.wide_loads), *cells])
    return table(head, *lines)


def _cell(row: Row) -> str:
    spilled = f", **{row.kernel.spilled} B spilled**" if row.kernel.spilled else ""
    stack = f", {row.kernel.stack} B stack" if row.kernel.stack and not row.kernel.spilled else ""
    return f"{row.kernel.registers} r, {row.warps} w{spilled}{stack}"


LOOPS = (  # whose main loops are told of, and for which kernels
    ("w4_matmul.cu", r"Dense<f16, Integers"), ("w8a8_matmul.cu", r"w8a8_kernel"), ("attention.cu", r"<f16"),
)  # fmt: skip
# Marlin's loop for 16 tokens, as its published kernel has it (arXiv:2408.11743): a lane's 16 bytes are 32 weights
# of 8 products; 4 weights take 2 LOP3 and half a shift, a subtraction and an FMA of pairs, and 2 products of pairs
# with their scales.
MARLIN = {
    "tensor core": 1, "to shared memory, asynchronous": 1 / 8, "shared memory": 1 / 8 + 1 / 8, "16-bit pairs": 4,
    "bits and bytes": 2.5,
}  # fmt: skip


def mix_table() -> str:
    """The instructions of main loops, for each of the tensor cores'."""
    kinds, lines = (*cubin.CLASSES, "integers, moves"), []
    for source, wanted in LOOPS:
        for kernel in sorted(cubin.kernels(source, 80), key=lambda kernel: kernel.name):
            if re.search(wanted, kernel.name):
                loop = kernel.loop(r"HMMA") if source != "w8a8_matmul.cu" else kernel.loop("IMMA")
                found = cubin.classes(loop)
                units = found["tensor core"]
                mix = (f"{found[kind] / units:.2f}" for kind in kinds)
                lines.append([f"`{kernel.name}`", str(units), f"{len(loop) / units:.1f}", *mix])
    published = (f"{MARLIN[kind]:.2f}" if kind in MARLIN else "?" for kind in kinds)
    lines.append(["Marlin, 16 tokens, as published", "", "", *published])
    return table(["kernel", "tensor core's in the loop", "instructions for each", *kinds], *lines)


def issue_table() -> str:
    """How long the schedulers take to begin all instructions of w4_matmul's main loop."""
    lines = []
    for kernel in sorted(cubin.kernels("w4_matmul.cu", 80), key=lambda kernel: kernel.name):
        if not re.search(LOOPS[0][1], kernel.name):
            continue
        loop, tiles = kernel.loop("HMMA"), int(kernel.name.split(", ")[-1].rstrip(">"))
        # A step of 32 rows and 32 k has 4 of a tile of 8 tokens, and 2 more where there are offsets.
        steps = cubin.classes(loop)["tensor core"] // (6 * tiles)
        begun = gpu_traffic.N // 32 * (gpu_traffic.K // 32) // steps * len(loop)
        times = (f"{1e6 * device.issue_seconds(begun):.1f}" for device in gpu_limits.DEVICES)
        lines.append([str(8 * tiles), *times])
    return table(["tokens", *(f"{device.name}, µs" for device in gpu_limits.DEVICES)], *lines)


def account(archs: tuple[int, ...] = cubin.ARCHS) -> str:
    version = cubin.nvcc._version(cubin.nvcc.find()).split("release ")[1].split(",")[0]
    jobs = [(cubin.KERNELS / source, (arch,), True) for arch in archs for source in cubin.sources()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: cubin.nvcc.compiled(*job), jobs))
    of_arch = {arch: rows(arch) for arch in archs}
    return f"""\
Compiled by nvcc {version}.  **r**: registers of a thread; **w**: warps that a multiprocessor holds at
once, of {", ".join(f"{gpu_limits.ARCHS[a].warps} (sm_{a})" for a in archs)}; shared
memory as the launcher asks for it on sm_80; tensor-core instructions and loads of 16 bytes from global
memory in the code for sm_80.

{code_table(of_arch)}
Main loops on sm_80: instructions for each of the tensor cores', m16n8k16 or int8's m16n8k32, those of
branches not taken included (offsets, f32 scales, masks).  (With 64 tokens `w4_matmul`'s loop is over steps
and does not hold the copies.)

{mix_table()}
How long four schedulers for each multiprocessor take to begin all of `w4_matmul`'s for n = k = {gpu_traffic.N} and
one tile of tokens:

{issue_table()}
Bytes that the emulator counts, in sectors of 32, for a part of each case on as many fewer multiprocessors than an
A100's: **touched**, each once, as memory sees them where L2 holds the rest, and **moved** between chip and L2.
Of 512 tokens each block of 64 (sparse: 32) reads W again, and each block of rows x; in attention each block of 128
queries reads all keys and values it sees.  Blocks that share out k, or the tokens of a cache, write and read their
sums, which stay in L2: that is what `block_sparse_matmul` and `paged_attention` touch beyond the least
([test_cuda_traffic.py](../tests/test_cuda_traffic.py)).  And the time that bandwidth and tensor cores leave on
paper, whichever is longer, of int8 for w8a8:

{table(*gpu_traffic.lines())}"""


if __name__ == "__main__":  # architectures may be named: 80 90
    archs = tuple(map(int, sys.argv[1:])) or cubin.ARCHS
    harness.put_between(FILE, BEGIN, END, account(archs))
