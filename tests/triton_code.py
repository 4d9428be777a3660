"""What Triton makes of the kernels for each target, compiled without a GPU: ``python -m tests.triton_code``
prints it as JSON.  A process of its own, as Triton either interprets or compiles.

Tools that Triton brings read the code: cuobjdump NVIDIA's cubins; AMD's is assembly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What multiplies matrices, by what it is called in the code.
MATRIX = {
    "mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma", "wmma": r"\bv_wmma",
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """``registers``: of a thread; ``spills``: bytes of local memory, or on AMD registers that went to
    memory; ``looped``: whether any come and go in a loop (on AMD it is not looked at, and taken for so);
    ``shared``: bytes of a block; ``matrix``: instructions by name; ``wide``: loads of 16 bytes from global
    memory, copies to shared memory among them."""

    kernel: str
    target: str
    config: str
    warps: int
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    wide: int
    error: str = ""
    looped: bool = False


def _cuobjdump(code: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _usage(code: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory."""
    usage = _cuobjdump(code, "-res-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def _spills_in_loops(code: bytes) -> bool:
    """Whether any instruction on local memory lies between a branch backwards and where it goes."""
    listed = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _cuobjdump(code, "-sass"))
    instructions = [(int(at, 16), text) for at, text in listed]
    branches = ((at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for at, text in instructions)
    loops = [(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) < at]
    local = [at for at, text in instructions if re.search(r"\b(STL|LDL)\b", text)]
    assert local
    return any(begin <= at <= end for at in local for begin, end in loops)


def read(name: str, target_name: str, config: str, warps: int, compiled) -> Code:
    asm = compiled.asm
    if "cubin" in asm:
        text, usage = asm["ptx"], _usage(asm["cubin"])
        registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
        looped = spills > 0 and _spills_in_loops(asm["cubin"])
        wide = len(re.findall(r"ld\.global[.\w]*\.v4\.(?:b|u|f)32|cp\.async\.\w+\.shared\.global[^;]*, (?:0x10|16),", text))
    else:
        text = asm["amdgcn"]
        registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        spills = max(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        looped = spills > 0
        wide = len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text))
    matrix = {key: count for key, pattern in MATRIX.items() if (count := len(re.findall(pattern, text)))}
    return Code(
        name, target_name, config, warps, registers, spills, compiled.metadata.shared, matrix, wide, looped=looped
    )


def compile_all(only: str, targets: list[str]) -> list[Code]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from memlm.kernels._targets import TARGETS

    from .triton_specimens import specimens

    found = []
    for name in targets:
        target = TARGETS[name]
        for specimen in specimens(target):
            if not re.search(only, specimen.name):
                continue
            source = ASTSource(
                fn=specimen.kernel, signature=specimen.signature, constexprs=specimen.constexprs,
                attrs={path: [["tt.divisibility", 16]] for path in specimen.aligned},
            )  # fmt: skip
            options = {"num_warps": specimen.warps, "num_stages": specimen.stages}
            about = (specimen.name, name, specimen.config, specimen.warps)
            try:
                to = GPUTarget(target.backend, target.arch, target.warp)
                found.append(read(*about, triton.compile(source, target=to, options=options)))
            except Exception as error:  # whatever the compiler raises is what there is to tell
                found.append(Code(*about, 0, 0, 0, {}, 0, f"{type(error).__name__}: {str(error)[:200]}"))
    return found


def account(only: str = "", targets: list[str] | None = None) -> list[Code]:
    """Of the kernels whose names match, from a process that compiles them."""
    command = [sys.executable, "-m", "tests.triton_code", "--only", only]
    if targets:
        command += ["--targets", *targets]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Code(**one) for one in json.loads(done.stdout)]


def main() -> None:
    from memlm.kernels._targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    given = parser.parse_args()
    print(json.dumps([asdict(code) for code in compile_all(given.only, given.targets)]))


if __name__ == "__main__":
    main()
