"""The C ABI without Python: the example in C compiles without a warning, links, and computes what
it should; tests/cpp/check.cpp compares every operation with a reference of its own."""

import shutil
import subprocess

import pytest

import memlm
from memlm.cpu import include_path, lib_path

from .checked import assert_all_checked
from .test_packaging import ROOT

COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    program, library = tmp_path_factory.mktemp("c") / "matmul", lib_path().parent
    subprocess.run(
        [COMPILER, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", ROOT / "examples/matmul.c",
         f"-I{include_path()}", f"-L{library}", "-lmemlm", f"-Wl,-rpath,{library}", "-o", program],
        check=True,
    )  # fmt: skip
    return program


@pytest.mark.parametrize("isa", memlm.isas())
def test_example(example, isa):
    done = subprocess.run([example], capture_output=True, text=True, env={"MEMLM_CPU_ISA": isa})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{isa}: largest error")
    assert "refused: x_stride: got 1, x has 100 columns" in done.stdout


def test_an_instruction_set_that_does_not_run_here_is_said(example):
    done = subprocess.run([example], capture_output=True, text=True, env={"MEMLM_CPU_ISA": "sve9"})
    assert done.returncode == 0
    assert "MEMLM_CPU_ISA=sve9 does not run here" in done.stderr


def test_needs_no_torch_and_no_python(example):
    linked = subprocess.run(["ldd", lib_path()], capture_output=True, text=True, check=True).stdout
    assert "torch" not in linked and "python" not in linked


def test_every_operation(tmp_path):
    program, library = tmp_path / "check", lib_path().parent
    subprocess.run(
        ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", ROOT / "tests/cpp/check.cpp",
         f"-L{library}", "-lmemlm", f"-Wl,-rpath,{library}", "-o", program],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, env={"MEMLM_CPU_ISA": ""})
    assert done.returncode == 0, done.stderr
    assert_all_checked(done.stdout, memlm.isas())
