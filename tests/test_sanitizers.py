"""The C++ core under the address, undefined-behaviour and thread sanitizers: the programs in
tests/cpp."""

import subprocess

import pytest

import memlm

from . import build

SANITIZERS = pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])


def sanitized(name, folder, sanitizers, isas):
    # Optimising what these instrument takes minutes: the address sanitizer's checks most of all, of which
    # those that it makes twice are left out.
    level = ["-O1"] if sanitizers == "thread" else ["-O0", "-fno-sanitize=null,object-size,pointer-overflow"]
    flags = [f"-fsanitize={sanitizers}", *level, "-g1", "-fno-sanitize-recover=all"]
    return build.program(name, folder, flags, isas)


@SANITIZERS
def test_fuzz(tmp_path, sanitizers):
    # Others are compiled to be linked: what does not run here, and avxvnni, which is avx2 but for one
    # instruction.  A sanitized one takes a minute.
    watched = set(memlm.isas()) - {"avxvnni"}
    plain = ["-O0", "-fno-sanitize=all"]
    isas = {isa: f if isa in watched else [*f, *plain] for isa, f in build.isa_flags().items()}
    program = sanitized("fuzz", tmp_path, sanitizers, isas)
    done = subprocess.run([program, "300"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "".join(f"{isa}: 300 cases\n" for isa in memlm.isas())


@SANITIZERS
def test_parallel_for(tmp_path, sanitizers):
    program = sanitized("parallel_for", tmp_path, sanitizers, None)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-4000:]
