"""Which instruction set the CPU kernels run on."""

from __future__ import annotations

from pathlib import Path

from memlm import _core


def isa() -> str:
    """The instruction set in use: the best this CPU has, or what MEMLM_CPU_ISA asked for."""
    return _core.isa()


def isas() -> list[str]:
    """All that this CPU can run, best first."""
    return _core.isas()


def tile_rows() -> int:
    """From how many rows of x on the matmuls run on the CPU's tile unit (AMX), whose arithmetic
    :func:`memlm.ops.w4_matmul` describes; 0 where the instruction set in use has none."""
    return _core.tile_rows()


def set_isa(name: str) -> None:
    """Use another of :func:`isas` from now on, in the whole process: for tests and benchmarks.

    Raises ValueError for one that does not run here.
    """
    _core.set_isa(name)


def lib_path() -> Path:
    """The shared library behind the C ABI."""
    return Path(__file__).parent / "libmemlm.so"


def include_path() -> Path:
    """The folder of ``memlm.h``, which declares and documents the C ABI."""
    here = Path(__file__).parent
    installed = here / "include"
    return installed if installed.exists() else here.parent / "csrc" / "include"  # editable
