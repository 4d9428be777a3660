"""Compiles the C++ core together with a program in tests/cpp, for tests of what Python cannot see:
other compiler flags, other machines."""

import platform
import subprocess
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ROOT / "csrc" / "cpu"


def isa_flags(machine: str = platform.machine()) -> dict[str, list[str]]:
    """The compiler flags of every instruction set of ``machine``."""
    parser = ConfigParser()
    parser.read(CORE / "isa" / "flags.ini")
    section = parser[machine if machine in parser else "DEFAULT"]
    return {name: flags.split() for name, flags in section.items()}


def program(
    name: str, folder: Path, flags: list[str], isas: dict[str, list[str]] | None, compiler: str = "g++"
) -> Path:
    """Builds tests/cpp/``name``.cpp in ``folder``: all of it with ``flags``, the kernels of each of
    ``isas`` with more.  None: the threads alone, without kernels."""
    units = {CORE / "isa" / f"{isa}.cpp": more for isa, more in (isas or {}).items()}
    threads = [CORE / "pool.cpp", CORE / "threads.cpp"]
    others = [ROOT / "tests" / "cpp" / f"{name}.cpp"]
    others += threads if isas is None else sorted(CORE.glob("*.cpp"))
    units |= {unit: [] for unit in others}
    common = [compiler, "-std=c++17", "-ffp-contract=off", "-w", *flags]
    running = [
        subprocess.Popen([*common, *more, "-c", unit, "-o", folder / f"{unit.stem}.o"])
        for unit, more in units.items()
    ]
    assert [process.wait() for process in running] == [0] * len(units)
    objects = [folder / f"{unit.stem}.o" for unit in units]
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", folder / name], check=True)
    return folder / name
