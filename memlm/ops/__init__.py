"""The operations: fused kernels over packed weights, as torch ops (``torch.ops.memlm.*``)."""

from __future__ import annotations

import torch

from memlm.formats import Format, Packed
from memlm.ops._registry import implementations
from memlm.ops.dequantize import dequantize
from memlm.ops.embedding import embedding
from memlm.ops.w4_matmul import w4_matmul
from memlm.ops.w8_matmul import w8_matmul

MODES = ("fast", "accurate")
# Bits per weight -> mode.  Rounding the activations to 8 bits costs less than rounding weights to
# 4 does, but more than rounding them to 8: on SmolLM2 0.003 nats of KL, against 0.2 and 0.001.
DEFAULT_MODES = {4: "fast", 8: "accurate"}

__all__ = ["MODES", "dequantize", "embedding", "implementations", "matmul", "w4_matmul", "w8_matmul"]


def check_mode(mode: str) -> str:
    """``mode``, or ValueError."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, accepted are {MODES}")
    return mode


def mode_for(format: Format, mode: str | None) -> str:
    """``mode``, or where it is None the default for ``format``.  Raises ValueError for others."""
    return DEFAULT_MODES[format.bits] if mode is None else check_mode(mode)


def matmul(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None = None,
    mode: str | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + bias`` by the operation that fits ``packed.format``: see :func:`w4_matmul`.
    ``mode`` is ``"fast"``, ``"accurate"``, or None for what ``DEFAULT_MODES`` says."""
    fast = mode_for(packed.format, mode) == "fast"
    p = packed
    rest = (p.n, p.k, p.format.group, bias, fast, norm, eps, swiglu, residual)
    if p.format.bits == 4:
        return w4_matmul(x, p.codes, p.scales, p.offsets, *rest)
    return w8_matmul(x, p.codes, p.scales, *rest)
