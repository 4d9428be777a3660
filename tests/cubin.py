"""The CUDA kernels as compiled: registers, and the instructions of each, read out of the machine code."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"

_spec = importlib.util.spec_from_file_location("memlm_nvcc", KERNELS / "nvcc.py")
nvcc = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(nvcc)

ARCHS = nvcc.ARCHS


@functools.cache
def nvdisasm() -> Path | None:
    """NVIDIA's disassembler: beside nvcc, in PATH, or in a PyPI package (its own, or Triton's)."""
    places = [nvcc.find() and nvcc.find().with_name("nvdisasm"), shutil.which("nvdisasm")]
    for site in dict.fromkeys((sysconfig.get_path("platlib"), *sys.path)):
        places += sorted(Path(site).glob("nvidia/cu*/bin/nvdisasm"), reverse=True)
        places.append(Path(site) / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm")
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


needs_nvcc = pytest.mark.skipif(not nvcc.find(), reason=nvcc.MISSING)
needs_tools = pytest.mark.skipif(
    not (nvcc.find() and nvdisasm()),
    reason=f"{nvcc.MISSING}; nvidia-cuda-nvdisasm the disassembler",
)


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers, as in LDG.E.128
    label: str  # of the place it jumps to, or ""


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code for one architecture.  ``name`` is its C++ name, without types of
    parameters; ``shared`` bytes of shared memory beside what a launch gives; ``spilled`` bytes of
    registers stored elsewhere; ``labels`` are the places that jumps go to, by address."""

    name: str
    arch: int
    registers: int
    shared: int
    stack: int
    spilled: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def count(self, pattern: str) -> int:
        """Instructions whose whole name matches."""
        return sum(bool(re.fullmatch(pattern, i.name)) for i in self.instructions)

    def tensor_core(self) -> list[str]:
        """The kinds of instructions that multiply matrices: HMMA.16816.F32 and such."""
        found = (i.name for i in self.instructions)
        return sorted({name for name in found if re.match(r"(HMMA|IMMA|[UQ]?TCGEN)\b", name)})

    def loop(self, pattern: str) -> list[Instruction]:
        """The smallest loop around an instruction whose name begins so: from the place that a jump
        back goes to, to that jump.  Raises ValueError where there is none."""
        loops = [
            (self.labels[i.label], i.address)
            for i in self.instructions
            if i.name.startswith("BRA") and self.labels.get(i.label, i.address) < i.address
        ]
        wanted = [i.address for i in self.instructions if i.name.startswith(pattern)]
        around = [(a, b) for a, b in loops if any(a <= at <= b for at in wanted)]
        if not around:
            raise ValueError(f"{self.name}: no loop around {pattern}")
        first, last = min(around, key=lambda ends: ends[1] - ends[0])
        return [i for i in self.instructions if first <= i.address <= last]


# What kinds of instructions do, by how their names begin.
CLASSES = {
    "tensor core": ("HMMA", "IMMA"),
    "to shared memory, asynchronous": ("LDGSTS",),
    "shared memory": ("LDS", "STS"),
    "global memory": ("LDG", "STG"),
    "16-bit pairs": ("HFMA2", "HADD2", "HMUL2"),
    "f32": ("FFMA", "FMUL", "FADD", "FSEL", "FSETP"),
    "bits and bytes": ("LOP3", "PRMT", "SHF", "SGXT"),
    "conversion": ("F2F", "I2F", "F2I", "F2FP", "I2FP"),
    "barriers and waits": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "SYNCS", "NOP"),
    "branches": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET"),
}


def classes(instructions: list[Instruction]) -> Counter:
    """How many there are of each class; the rest are addresses and loop counters."""
    found = Counter()
    for instruction in instructions:
        base = instruction.name.split(".")[0]
        found[next((c for c, names in CLASSES.items() if base in names), "integers, moves")] += 1
    return found


_LINE = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")


def parse(listing: str, report: str, arch: int) -> list[Kernel]:
    """The kernels in what ``nvdisasm -c`` prints, and ``ptxas -v``."""
    sections = re.split(r"\n\t\.section\t\.text\.", listing)[1:]
    mangled = [section.split(",")[0] for section in sections]
    if not mangled:
        return []
    names = subprocess.run(["c++filt", "-p", *mangled], check=True, capture_output=True, text=True)
    found = []
    for symbol, name, section in zip(mangled, names.stdout.splitlines(), sections):
        instructions, labels, waiting = [], {}, []
        for line in section.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                waiting.append(label[1])
            elif match := _LINE.match(line):
                address = int(match[1], 16)
                labels |= dict.fromkeys(waiting, address)
                waiting = []
                target = re.search(r"`\((\.L_x_\d+)\)", match[3])
                instructions.append(Instruction(address, match[2], target[1] if target else ""))
        code = (tuple(instructions), labels)
        found.append(Kernel(short(name), arch, *_resources(report, symbol), *code))
    return found


def _resources(report: str, symbol: str) -> tuple[int, int, int, int]:
    """Registers, and bytes of static shared memory, of the stack frame, and spilled."""
    said = re.split(r"Compiling entry function ", report.split(f"Compiling entry function '{symbol}'")[1])[0]

    def number(pattern: str) -> int:
        match = re.search(pattern, said)
        return int(match[1]) if match else 0

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), number(r"(\d+) bytes stack"), spilled


def short(name: str) -> str:
    """``f<T, 1>`` of the demangled ``void memlm::cuda::(anonymous namespace)::f<memlm::T, (an_enum)1>``."""
    return re.sub(r"memlm::|cuda::|\(anonymous namespace\)::|\(memlm_kv_type\)|^void |\(.*\)$", "", name)


@functools.cache
def kernels(source: str, arch: int) -> list[Kernel]:
    """Of csrc/cuda/``source``, for a compute capability times 10."""
    cubin = nvcc.compiled(KERNELS / source, (arch,), cubin=True)
    listing = subprocess.run([nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True)
    return parse(listing.stdout, cubin.with_suffix(".txt").read_text(), arch)


def sources() -> list[str]:
    """Those that hold kernels."""
    return [path.name for path in sorted(KERNELS.glob("*.cu"))]
