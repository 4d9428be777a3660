"""What a GPU has for one block of threads, by which configurations are chosen before any is tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """``shared``: bytes that one block may have; ``registers``: of 32 bits, for a thread at most;
    ``need``: registers for each accumulator of the packed matmuls, as the compiler takes them
    (``python -m tests.triton_code``): operands are copied for products without matrix instructions (sm_75),
    and held twice by RDNA's; ``step``: k of one product, at most: these two hold no more of them;
    ``stages``: of operands, at most: on RDNA 3 they are registers, and CDNA 3 has shared memory for two."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    registers: int
    need: int
    step: int = 64
    stages: int = 5


# NVIDIA: CUDA C++ programming guide 13.0, "compute capabilities", technical specifications for each.
# AMD: CDNA 3 and RDNA 3 instruction set guides; 64 KB of LDS a workgroup, 512 and 256 VGPRs a lane.
TARGETS = {
    "sm_75": Target("cuda", 75, 32, 64 << 10, 255, 5, 32),
    "sm_80": Target("cuda", 80, 32, 163 << 10, 255, 2),
    "sm_86": Target("cuda", 86, 32, 99 << 10, 255, 2),
    "sm_89": Target("cuda", 89, 32, 99 << 10, 255, 2),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 255, 2),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 255, 2),
    "sm_120": Target("cuda", 120, 32, 99 << 10, 255, 2),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 512, 5, 64, 2),
    "gfx1100": Target("hip", "gfx1100", 32, 64 << 10, 256, 8, 32, 2),
}


def fits(target: Target, shared: int, accumulators: int, threads: int) -> bool:
    """Whether a block has room for ``shared`` bytes of all stages, and for ``accumulators`` 32-bit
    numbers that its ``threads`` keep."""
    return shared <= target.shared and target.need * accumulators <= threads * target.registers
