"""Builds four libraries (everything else stands in pyproject.toml):

``memlm/libmemlm.so``       the kernels behind the C ABI, one static library per instruction set in it
``memlm/libmemlm_cuda.so``  those for NVIDIA GPUs, where nvcc is; csrc/cuda/nvcc.py
``memlm/_torch.so``         the torch ops, on libtorch's stable ABI: loaded with torch.ops.load_library
``memlm/_core.*.so``        the Python module over the C ABI; needs no torch
"""

import platform
import sys
import sysconfig
from configparser import ConfigParser
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc/cuda")
import nvcc  # noqa: E402

# The oldest torch that the ops must load in.
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]
flags = ConfigParser()
flags.read("csrc/cpu/isa/flags.ini")
machine = platform.machine()
ISA_FLAGS = {
    isa: line.split() for isa, line in flags[machine if machine in flags else "DEFAULT"].items()
}

HEADERS = [str(p) for p in Path("csrc").rglob("*.h") if p.parent.name not in ("cuda", "torch")]


def find_torch():
    """Where torch lies: in the environment that is installed into (also when pip builds in an
    isolated one), or else in the one that builds.  Any torch from 2.10 on will do."""
    sites = [sysconfig.get_path("platlib"), *sys.path]
    for torch in (Path(site) / "torch" for site in sites):
        if (torch / "include/torch/csrc/stable/library.h").exists():
            return torch
    return None


class BuildExt(build_ext):
    """Gives the libraries that are no Python modules their plain names, and nvcc its own."""

    def get_ext_filename(self, name):
        *package, module = name.split(".")
        if module in ("libmemlm", "libmemlm_cuda", "_torch"):
            return str(Path(*package, module + ".so"))
        return super().get_ext_filename(name)

    def get_export_symbols(self, ext):
        return ext.export_symbols  # no PyInit function is demanded of them

    def build_extension(self, ext):
        if ext.name == "memlm.libmemlm_cuda":
            nvcc.build(Path(self.get_ext_fullpath(ext.name)), CUDA_ARCHS)
            return
        if ext.name != "memlm.libmemlm":  # the others link with it, and find it beside them
            folder = Path(self.get_ext_fullpath("memlm.libmemlm")).parent
            ext.extra_link_args += [f"-L{folder}", "-lmemlm", "-Wl,-rpath,$ORIGIN"]
        super().build_extension(ext)


torch = find_torch()
CUDA_ARCHS = nvcc.chosen_archs()
if not CUDA_ARCHS:
    why = "MEMLM_CUDA_ARCHS asks for none" if nvcc.find() else nvcc.MISSING
    print(f"memlm: without CUDA kernels ({why})")

setup(
    # Without torch's headers at hand, pip fetches a torch to build with.
    setup_requires=[] if torch else ["torch>=2.10"],
    libraries=[
        (
            f"memlm_{isa}",
            {
                "sources": [f"csrc/cpu/isa/{isa}.cpp"],
                "cflags": [*COMMON, *flags],
                "obj_deps": {"": HEADERS},
            },
        )
        for isa, flags in ISA_FLAGS.items()
    ],
    ext_modules=[
        Extension(
            "memlm.libmemlm",
            [*sorted(map(str, Path("csrc/cpu").glob("*.cpp"))), "csrc/bench/limits.cpp"],
            depends=HEADERS,
            extra_compile_args=COMMON,
            # Its threads sleep in its code: dlclose must leave it where it is.
            extra_link_args=["-pthread", "-Wl,-z,nodelete"],
            language="c++",
        ),
        Extension(
            "memlm._torch",
            sorted(map(str, Path("csrc/torch").glob("*.cpp"))),
            include_dirs=[str(torch / "include")] if torch else [],
            library_dirs=[str(torch / "lib")] if torch else [],
            libraries=["torch_cpu"],
            depends=[*HEADERS, *map(str, Path("csrc/torch").glob("*.h"))],
            extra_compile_args=[*COMMON, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"],
            language="c++",
        ),
        *([Extension("memlm.libmemlm_cuda", [])] if CUDA_ARCHS else []),
        Extension(
            "memlm._core",
            ["csrc/bind.cpp", "csrc/array.cpp", "csrc/arrays.cpp", "csrc/decoder_bind.cpp"],
            include_dirs=[pybind11.get_include()],
            depends=HEADERS,
            extra_compile_args=COMMON,
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExt},
)
