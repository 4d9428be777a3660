"""The C++ core under the address, undefined-behaviour and thread sanitizers: tests/cpp/fuzz.cpp."""

import subprocess

import pytest

import memlm

from . import build


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_fuzz(tmp_path, sanitizers):
    # Not -O3, which takes minutes under sanitizers.
    flags = ["-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    fuzz = build.program("fuzz", tmp_path, flags, build.isa_flags())
    done = subprocess.run([fuzz, "300"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "".join(f"{isa}: 300 cases\n" for isa in memlm.isas())
