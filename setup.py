"""Builds three libraries (everything else stands in pyproject.toml):

``memlm/libmemlm.so``  the kernels behind the C ABI, one static library per instruction set in it
``memlm/_torch.so``    the torch ops, on libtorch's stable ABI: loaded with torch.ops.load_library
``memlm/_core.*.so``   the Python module over the C ABI; needs no torch
"""

import platform
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The oldest torch that the ops must load in.
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]
ISA_FLAGS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]
    avx512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # in GCC 12's own headers
    ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS["avx2"], *avx512]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512vnni"], "-mavx512bf16"]
if platform.machine() in ("aarch64", "arm64"):
    # 16 lanes are four registers there: GCC counts functions too long to inline, and its scheduling
    # before register allocation makes the loops spill.
    neon = ["-finline-limit=5000", "-fno-schedule-insns"]
    ISA_FLAGS["neon_dotprod"] = ["-march=armv8.2-a+dotprod", *neon]
    ISA_FLAGS["neon_i8mm"] = ["-march=armv8.2-a+dotprod+i8mm", *neon]

HEADERS = [str(p) for p in Path("csrc").rglob("*.h")]


def find_torch():
    """Where torch lies: in the environment that is installed into (also when pip builds in an
    isolated one), or else in the one that builds.  Any torch from 2.10 on will do."""
    sites = [sysconfig.get_path("platlib"), *sys.path]
    for torch in (Path(site) / "torch" for site in sites):
        if (torch / "include/torch/csrc/stable/library.h").exists():
            return torch
    return None


class BuildExt(build_ext):
    """Gives the two libraries that are no Python modules their plain names."""

    def get_ext_filename(self, name):
        *package, module = name.split(".")
        if module in ("libmemlm", "_torch"):
            return str(Path(*package, module + ".so"))
        return super().get_ext_filename(name)

    def get_export_symbols(self, ext):
        return ext.export_symbols  # no PyInit function is demanded of them

    def build_extension(self, ext):
        if ext.name != "memlm.libmemlm":  # the others link with it, and find it beside them
            folder = Path(self.get_ext_fullpath("memlm.libmemlm")).parent
            ext.extra_link_args += [f"-L{folder}", "-lmemlm", "-Wl,-rpath,$ORIGIN"]
        super().build_extension(ext)


torch = find_torch()

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
            ["csrc/cpu/dispatch.cpp", "csrc/cpu/threads.cpp", "csrc/bench/limits.cpp"],
            depends=HEADERS,
            extra_compile_args=COMMON,
            extra_link_args=["-pthread"],
            language="c++",
        ),
        Extension(
            "memlm._torch",
            ["csrc/torch/ops.cpp"],
            include_dirs=[str(torch / "include")] if torch else [],
            library_dirs=[str(torch / "lib")] if torch else [],
            libraries=["torch_cpu"],
            depends=HEADERS,
            extra_compile_args=[*COMMON, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"],
            language="c++",
        ),
        Extension(
            "memlm._core",
            ["csrc/bind.cpp"],
            include_dirs=[pybind11.get_include()],
            depends=HEADERS,
            extra_compile_args=COMMON,
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExt},
)
