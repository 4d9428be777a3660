"""The wheel: what is in it, and that it works from anywhere, in an environment of its own."""

import ctypes
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from . import cubin

ROOT = Path(__file__).parent.parent

CHECK = """
import os, pathlib, sys, torch, memlm, memlm.ops
home = pathlib.Path(memlm.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), home
w = torch.randn(50, 70)
packed = memlm.quantize_weight(w, "int8")
y = memlm.ops.matmul(torch.eye(70), packed, mode="accurate")
torch.testing.assert_close(y, memlm.ops.dequantize(packed).T)
assert (memlm.cpu.include_path() / "memlm.h").is_relative_to(home.parent)
assert (memlm.cpu.include_path() / "memlm.h").exists()
print(os.environ.get("MEMLM_CPU_ISA", "-"), memlm.isa())
"""


CHECK_WITHOUT_TORCH = """
import importlib.util
import numpy, memlm.arrays
assert importlib.util.find_spec("torch") is None
packed = memlm.arrays.quantize(numpy.eye(50, 70, dtype="f4"), "int8")
print(memlm.arrays.matmul(numpy.ones((1, 70), "f4"), packed).round(2).sum())
"""


def build_wheel(folder: Path, cuda_archs: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    env = os.environ | {"MEMLM_CUDA_ARCHS": cuda_archs}
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True, env=env)
    (found,) = folder.glob("memlm-*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), "none")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The python of a new virtual environment that holds the wheel.  Its dependencies are those
    installed beside the tests, seen through a path file: which brings no editable memlm along."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True
    )
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("memlm/libmemlm.so", "memlm/_torch.so", "memlm/include/memlm.h", "memlm/cli.py"):
        assert needed in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "csrc/"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)


@cubin.needs_nvcc
@pytest.mark.gpu_proof
def test_cuda_kernels_are_in_the_wheel(tmp_path):
    """All of them, in a library that opens here."""
    wheel = zipfile.ZipFile(build_wheel(tmp_path, "80"))
    library = ctypes.CDLL(wheel.extract("memlm/libmemlm_cuda.so", tmp_path))
    declared = re.findall(r"\b(memlm_cuda_\w+)\(", (ROOT / "csrc/include/memlm_cuda.h").read_text())
    assert len(declared) > 4 and all(hasattr(library, name) for name in declared)


def test_works_from_any_directory(environment, tmp_path):
    done = subprocess.run(
        [environment, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [environment, "-c", CHECK],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "MEMLM_CPU_ISA": "scalar"},
    )  # fmt: skip
    assert done.stdout.split() == ["scalar", "scalar"], done.stderr


def test_arrays_work_where_there_is_no_torch(environment, tmp_path):
    (site,) = environment.parent.parent.glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_path("purelib")).glob("numpy*"):
        (tmp_path / package.name).symlink_to(package)
    done = subprocess.run(
        [environment, "-S", "-c", CHECK_WITHOUT_TORCH],  # -S: no site-packages but these
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": f"{tmp_path}:{site}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "50.0\n"


def test_command(environment, tmp_path):
    command = environment.with_name("memlm")
    done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("demo", "quantize", "info", "generate", "eval", "bench"):
        assert name in done.stdout
    done = subprocess.run(
        [command, "info", "nowhere"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "nowhere: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_and_modules_load_on_first_use():
    script = """
import sys, memlm
assert "torch" not in sys.modules, "import memlm stays quick"
for name in memlm.__all__:
    assert getattr(memlm, name).__name__.split(".")[-1] == name
assert set(memlm.__all__) <= set(dir(memlm))
try:
    memlm.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
