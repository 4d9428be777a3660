"""What the architectures and some GPUs have, as data.

Architectures: CUDA C++ Programming Guide 13.0, "Compute Capabilities", its tables of technical
specifications; registers and shared memory are given out in the units of its ``cuda_occupancy.h``.
GPUs: NVIDIA's data sheets of the A100 80GB SXM, the H100 SXM, and the Ada architecture's white paper
(RTX 4090); tensor-core rates are dense, of f16 with f32 sums and of int8.
"""

from dataclasses import dataclass

KB = 1024
REGISTERS = 64 * KB  # of a multiprocessor
REGISTER_UNIT = 256  # given to a warp at a time
MOST_REGISTERS = 255  # of a thread
WARP = 32
SCHEDULERS = 4  # of a multiprocessor: each begins an instruction of one warp a clock
RESERVED_SHARED = 1 * KB  # of each block, from 8.0 on


@dataclass(frozen=True)
class Arch:
    """Per multiprocessor, and the shared memory that one block may have."""

    warps: int
    blocks: int
    shared: int
    block_shared: int
    processors: int  # of a typical device


ARCHS = {
    75: Arch(32, 16, 64 * KB, 64 * KB, 68),
    80: Arch(64, 32, 164 * KB, 163 * KB, 108),
    86: Arch(48, 16, 100 * KB, 99 * KB, 82),
    89: Arch(48, 24, 100 * KB, 99 * KB, 128),
    90: Arch(64, 32, 228 * KB, 227 * KB, 132),
    100: Arch(64, 32, 228 * KB, 227 * KB, 148),
    120: Arch(48, 24, 100 * KB, 99 * KB, 170),
}


def resident_warps(arch: int, registers: int, threads: int, shared: int) -> int:
    """How many warps a multiprocessor holds at once of blocks of ``threads``, each thread with so
    many registers, each block with so many bytes of shared memory."""
    have = ARCHS[arch]
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    # Each scheduler has a quarter of the registers, and warps of its own.
    by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS // warps
    unit = 256 if arch < 80 else 128
    shared += RESERVED_SHARED if arch >= 80 else 0
    shared = -(-shared // unit) * unit
    by_shared = have.shared // shared if shared else have.blocks
    return warps * min(have.blocks, have.warps // warps, by_registers, by_shared)


@dataclass(frozen=True)
class Device:
    name: str
    arch: int
    bandwidth: float  # bytes per second
    f16: float  # multiply-adds per second
    int8: float
    processors: int
    clock: float  # boost, Hz

    def seconds(self, bytes: int, multiply_adds: int, int8: bool = False) -> float:
        """The roofline's: what neither memory nor the tensor cores can beat."""
        return max(bytes / self.bandwidth, multiply_adds / (self.int8 if int8 else self.f16))

    def issue_seconds(self, warp_instructions: int) -> float:
        """What the schedulers take to begin so many instructions."""
        return warp_instructions / (self.processors * SCHEDULERS * self.clock)


DEVICES = (
    Device("A100", 80, 2.039e12, 156e12, 312e12, 108, 1.41e9),
    Device("H100", 90, 3.35e12, 494.7e12, 989.4e12, 132, 1.83e9),
    Device("RTX 4090", 89, 1.008e12, 82.6e12, 330.3e12, 128, 2.52e9),
)
