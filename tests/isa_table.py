"""Writes docs/isas.md, which operation is executed by tests on which instruction set, and how:
``python -m tests.isa_table``."""

import memlm
from memlm import limits

from . import build, test_aarch64, test_isas
from .checked import OPERATIONS

FILE = build.ROOT / "docs" / "isas.md"
MACHINES = ("x86_64", "aarch64")
# Each of these runs asserts that every one of OPERATIONS was compared on every instruction set.
LEGEND = """\
- **N** natively, where the testing machine has it (tests/test_c_abi.py)
- **E** emulated in plain C++ (tests/test_isas.py): the logic, not the instructions
- **Q** the instructions, under qemu (tests/test_aarch64.py)
"""


def proofs(isa: str) -> str:
    emulated = isa in test_isas.EMULATED
    in_qemu = any(isa in isas for isas in test_aarch64.CPUS.values())
    return " ".join(["N", *["E"] * emulated, *["Q"] * in_qemu])


def table() -> str:
    """What does not depend on this machine."""
    isas = {isa: 0 for machine in MACHINES for isa in build.isa_flags(machine)}
    isas = sorted(isas, key="scalar".__ne__)
    rows = [["", *isas], ["---"] * (len(isas) + 1)]
    rows += [[operation, *map(proofs, isas)] for operation in OPERATIONS]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"# What is executed where\n\nEvery result is compared with a reference.\n\n{LEGEND}\n{lines}"


if __name__ == "__main__":
    here = f"{limits.cpu_name()}: {', '.join(memlm.isas())}"
    FILE.write_text(f"{table()}\nThe machine on which this was written, {here}.\n")
