"""The C++ core under the address, undefined-behaviour and thread sanitizers: the programs in
tests/cpp."""

import platform
import subprocess

import pytest

import memlm

from .test_packaging import ROOT

# As setup.py, without the optimisation, which would take minutes under sanitizers.
COMPILE = ["g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-w"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = AVX2
    ISA_FLAGS["avx512vnni"] = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))]


CORE = ROOT / "csrc" / "cpu"
THREADS = {CORE / "pool.cpp": [], CORE / "threads.cpp": []}
SANITIZERS = pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])


def build(tmp_path, units, sanitizers):
    """The program of ``units`` (each with its flags)."""
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    running = [
        subprocess.Popen([*COMPILE, *flags, *more, "-c", unit, "-o", tmp_path / f"{unit.stem}.o"])
        for unit, more in units.items()
    ]
    assert [process.wait() for process in running] == [0] * len(units)
    objects = sorted(tmp_path.glob("*.o"))
    subprocess.run(["g++", *flags, *objects, "-pthread", "-o", tmp_path / "program"], check=True)
    return tmp_path / "program"


@SANITIZERS
def test_fuzz(tmp_path, sanitizers):
    units = {CORE / "isa" / f"{isa}.cpp": isa_flags for isa, isa_flags in ISA_FLAGS.items()}
    units |= {CORE / "dispatch.cpp": [], ROOT / "tests/cpp/fuzz.cpp": []}
    program = build(tmp_path, units | THREADS, sanitizers)
    done = subprocess.run([program, "300"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "".join(f"{isa}: 300 cases\n" for isa in memlm.isas())


@SANITIZERS
def test_parallel_for(tmp_path, sanitizers):
    program = build(tmp_path, THREADS | {ROOT / "tests/cpp/parallel_for.cpp": []}, sanitizers)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-4000:]
