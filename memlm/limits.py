"""What this machine can do at most, measured: the yardstick of benchmarks and reports."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from memlm import _core

# Passes over the buffer, or over a loop of some 20 ms; the best counts, since a limit is what the
# machine can do, and a shared machine only ever takes away.
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """``dram_gbps``: bytes read from memory, GB/s (10^9), with 2 MB pages;
    ``dram_gbps_small_pages``: with 4 KB pages; ``f32_gmacs``, ``i8_gmacs``: multiply-adds in
    registers, 10^9 per second; all with ``threads`` threads."""

    threads: int
    dram_gbps: float
    dram_gbps_small_pages: float
    f32_gmacs: float
    i8_gmacs: float

    def to_dict(self) -> dict:
        return asdict(self)


def measure(threads: int) -> Limits:
    """Measures the limits with ``threads`` threads: about half a second.

    Raises ValueError for fewer than one thread.
    """
    if threads < 1:
        raise ValueError(f"threads: got {threads}, at least 1 is needed")
    size = max(256 << 20, 4 * cache_bytes())
    return Limits(
        threads,
        _core.limit_dram_gbps(threads, size, True, REPEATS),
        _core.limit_dram_gbps(threads, size, False, REPEATS),
        _core.limit_f32_gmacs(threads, REPEATS),
        _core.limit_i8_gmacs(threads, REPEATS),
    )


def cache_bytes() -> int:
    """Size of the largest cache; 32 MB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes, default=32 << 20)


def cpu_name() -> str:
    """The CPU's model name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
