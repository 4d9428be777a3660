"""The operations: fused kernels over packed weights, as torch ops (``torch.ops.memlm.*``)."""

from __future__ import annotations

import torch

from memlm.formats import Packed
from memlm.ops._registry import implementations
from memlm.ops.dequantize import dequantize
from memlm.ops.embedding import embedding
from memlm.ops.w4_matmul import w4_matmul
from memlm.ops.w8_matmul import w8_matmul

MODES = ("fast", "accurate")

__all__ = ["MODES", "dequantize", "embedding", "implementations", "matmul", "w4_matmul", "w8_matmul"]


def check_mode(mode: str) -> str:
    """``mode``, or ValueError."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, accepted are {MODES}")
    return mode


def matmul(
    x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, mode: str = "fast"
) -> torch.Tensor:
    """``x W^T + bias`` by the operation that fits ``packed.format``: see :func:`w4_matmul`."""
    fast = check_mode(mode) == "fast"
    p = packed
    if p.format.bits == 4:
        return w4_matmul(x, p.codes, p.scales, p.offsets, p.n, p.k, p.format.group, bias, fast)
    return w8_matmul(x, p.codes, p.scales, p.n, p.k, p.format.group, bias, fast)
