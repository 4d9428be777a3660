"""Instruction sets that the testing machine may lack: every operation (tests/cpp/check.cpp) on the
kernels of each, emulated.  SIMDe computes Intel's intrinsics in plain C, tests/cpp/emulated what it
lacks, AMX's tile unit included.  This shows the kernels' logic to be right; what the emulation takes
for granted, such as the few instructions written in assembly, only a CPU that has them can show.

Debian: ``apt-get install libsimde-dev``.
"""

import platform
import subprocess
from pathlib import Path

import pytest

from . import build
from .checked import assert_all_checked

EMULATED = ["amx", "avx512vnni", "avxvnni", "avx2", "scalar"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels of x86-64")
@pytest.mark.skipif(not Path("/usr/include/simde").exists(), reason="needs SIMDe: libsimde-dev")
def test_every_operation_emulated(tmp_path):
    # Whatever the machine has, for x86-64 alone: no instruction beyond SSE2.
    flags = ["-O1", "-Wno-psabi", f"-I{build.ROOT / 'tests/cpp/emulated'}"]
    check = build.program("check", tmp_path, flags, {isa: [] for isa in EMULATED})
    done = subprocess.run([check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_all_checked(done.stdout, EMULATED)
