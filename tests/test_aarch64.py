"""The C++ core for 64-bit Arm, cross-compiled with the flags that ship and run under qemu: every
operation on every instruction set (tests/cpp/check.cpp), on CPUs that have all, some and none of
the extensions.  An instruction that a CPU lacks ends the run.

Debian: ``apt-get install g++-aarch64-linux-gnu qemu-user-static``.
"""

import os
import runpy
import shutil
import subprocess
from unittest import mock

import pytest

from .checked import assert_all_checked
from .test_packaging import ROOT

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static")

pytestmark = pytest.mark.skipif(
    not (COMPILER and QEMU), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64-static"
)

# qemu's CPU models and what should run on them, best first.
CPUS = {
    "max": ["neon_i8mm", "neon_dotprod", "scalar"],
    "neoverse-n1": ["neon_dotprod", "scalar"],
    "cortex-a72": ["scalar"],
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of the programs check and fuzz."""
    folder = tmp_path_factory.mktemp("aarch64")
    with mock.patch("platform.machine", return_value="aarch64"), mock.patch("setuptools.setup"):
        build = runpy.run_path(str(ROOT / "setup.py"))
    core = ROOT / "csrc" / "cpu"
    units = {core / f"isa/{isa}.cpp": flags for isa, flags in build["ISA_FLAGS"].items()}
    common = [*sorted(core.glob("*.cpp")), ROOT / "csrc/bench/limits.cpp"]
    units |= {unit: [] for unit in common}
    compile = [COMPILER, *build["COMMON"], "-Wall", "-Wextra", "-Werror"]
    running = [
        subprocess.Popen([*compile, *flags, "-c", unit, "-o", folder / f"{unit.stem}.o"])
        for unit, flags in units.items()
    ]
    assert [process.wait() for process in running] == [0] * len(units)
    objects = sorted(folder.glob("*.o"))
    for name in ("check", "fuzz"):
        source = ROOT / f"tests/cpp/{name}.cpp"
        subprocess.run([*compile, "-static", source, *objects, "-o", folder / name], check=True)
    return folder


def run(cpu, *command, isa=""):
    environment = {**os.environ, "MEMLM_CPU_ISA": isa}
    return subprocess.run(
        [QEMU, "-cpu", cpu, *command], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("cpu", CPUS)
def test_every_operation(programs, cpu):
    done = run(cpu, programs / "check")
    assert done.returncode == 0, done.stderr
    assert_all_checked(done.stdout, CPUS[cpu])


def test_lower_ones_can_be_forced(programs):
    for isa in CPUS["max"]:
        done = run("max", programs / "check", "isas", isa=isa)
        assert done.stdout == f"{isa}: {' '.join(CPUS['max'])}\n" and not done.stderr
    done = run("neoverse-n1", programs / "check", "isas", isa="neon_i8mm")
    assert done.stdout == "neon_dotprod: neon_dotprod scalar\n"
    assert "MEMLM_CPU_ISA=neon_i8mm does not run here" in done.stderr


def test_random_calls(programs):
    done = run("max", programs / "fuzz", "100")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{isa}: 100 cases\n" for isa in CPUS["max"])
