"""Compiles the CUDA kernels with nvcc, for setup.py and the tests; as a program, in place:
``python csrc/cuda/nvcc.py``.

Objects are kept in build/cuda until their source, a header, nvcc or a flag changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda"
# Compute capabilities, times 10: Turing; Ampere; Ada; Hopper; Blackwell.  Later ones run the last's PTX.
ARCHS = (75, 80, 86, 89, 90, 100, 120)
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]
# What brings nvcc by pip: the compiler, its back end, and the headers and library of the runtime.
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")

MISSING = f"no nvcc of CUDA 13 or later; pip install {' '.join(PACKAGES)} brings one"


@functools.cache
def find() -> Path | None:
    """nvcc, of CUDA 13 or later: that of PATH, of CUDA_HOME, or of the PyPI packages in the
    environment that is installed into or that runs this."""
    home = os.environ.get("CUDA_HOME")
    places = [shutil.which("nvcc"), home and Path(home, "bin", "nvcc")]
    for site in dict.fromkeys((sysconfig.get_path("platlib"), *sys.path)):
        places += sorted(Path(site).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    found = (Path(place) for place in places if place and Path(place).is_file())
    return next((nvcc for nvcc in found if _major(nvcc) >= 13), None)


def _major(nvcc: Path) -> int:
    return int(re.search(r"release (\d+)", _version(nvcc))[1])


@functools.cache
def _version(nvcc: Path) -> str:
    return subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout


def chosen_archs() -> tuple[int, ...]:
    """Those that MEMLM_CUDA_ARCHS asks for, as in ``80;90``: none where it is empty or ``none``, and
    where it is not set all that this nvcc knows.  Raises ValueError for others."""
    asked = os.environ.get("MEMLM_CUDA_ARCHS", "all").strip().lower()
    if asked in ("", "none") or not find():
        return ()
    listed = subprocess.run([find(), "--list-gpu-code"], check=True, capture_output=True, text=True)
    known = [arch for arch in ARCHS if f"sm_{arch}" in listed.stdout.split()]
    if asked == "all":
        return tuple(known)
    named = asked.replace(",", ";").split(";")
    if unknown := [name for name in named if name not in map(str, known)]:
        raise ValueError(
            f"MEMLM_CUDA_ARCHS: got {unknown[0]!r}, accepted are none, all, or some of {known}"
        )
    return tuple(sorted(map(int, named)))


def _included(source: Path) -> set[Path]:
    """The source, and what it includes of ours."""
    found, left = set(), [source.resolve()]
    while left:
        file = left.pop()
        if file not in found and file.exists():
            found.add(file)
            names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
            left += [(file.parent / name).resolve() for name in names]
    return found


def compiled(source: Path, archs: tuple[int, ...], cubin: bool = False, threads: int = 1) -> Path:
    """The object of a source for some architectures, and later ones; with ``cubin`` the device code
    of one, beside what ptxas says of it (``.txt``)."""
    command = [find(), *FLAGS]
    if cubin:
        command += ["-cubin", f"-arch=sm_{archs[0]}", "-Xptxas=-v"]
    else:
        command.append("-c")
        # Compressed to a quarter; drivers that can run nvcc 13's code can unpack it.
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "--compress-mode=size"]
        command += ["--threads", str(threads)]
        for arch in archs:
            also = f",compute_{arch}" if arch == archs[-1] else ""
            command.append(f"-gencode=arch=compute_{arch},code=[sm_{arch}{also}]")
    digest = hashlib.sha256(repr(command).encode() + _version(find()).encode())
    for part in sorted(_included(source)):
        digest.update(part.read_bytes())
    made = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}{'.cubin' if cubin else '.o'}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}{made.suffix}")
        said = subprocess.run([*command, source, "-o", new], stderr=subprocess.PIPE, text=True)
        if said.returncode:
            raise RuntimeError(f"{source.name}: nvcc failed\n{said.stderr}")
        if cubin:
            made.with_suffix(".txt").write_text(said.stderr)
        new.rename(made)
    return made


def build(target: Path, archs: tuple[int, ...], sources: list[Path] | None = None) -> None:
    """Compiles and links the kernels.  The runtime is linked statically, so that the library loads
    where there is none."""
    # The largest first, so that none begins when the others are done.
    sources = sorted(sources or HERE.glob("*.cu"), key=lambda s: s.stat().st_size, reverse=True)
    cpus = os.cpu_count() or 1
    with ThreadPoolExecutor(cpus) as pool:
        threads = max(1, cpus // len(sources))
        objects = list(pool.map(lambda s: compiled(s, archs, threads=threads), sources))
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_suffix(f".{os.getpid()}.so")
    # No device code is linked, so any of the architectures does.
    command = [find(), "-shared", "-cudart", "static", f"-arch=sm_{archs[0]}", *objects, "-o", new]
    subprocess.run(command, check=True)
    new.rename(target)


if __name__ == "__main__":
    if not find():
        sys.exit(MISSING)
    archs = chosen_archs()
    if not archs:
        sys.exit("MEMLM_CUDA_ARCHS asks for nothing")
    library = ROOT / "memlm" / "libmemlm_cuda.so"
    build(library, archs)
    print(f"{library}: {library.stat().st_size / 1e6:.1f} MB, {', '.join(f'sm_{a}' for a in archs)}")
