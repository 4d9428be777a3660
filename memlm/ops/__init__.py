"""The operations: fused kernels over packed weights, as torch ops (``torch.ops.memlm.*``)."""

from __future__ import annotations

import torch

from memlm.formats import Format, Packed
from memlm.ops._registry import implementations
from memlm.ops.attention import attention, attention_varlen
from memlm.ops.dequantize import dequantize
from memlm.ops.embedding import embedding
from memlm.ops.kv_append import kv_append
from memlm.ops.matmul_topk import matmul_topk
from memlm.ops.paged_attention import paged_attention
from memlm.ops.quantize_rows import quantize_rows
from memlm.ops.quantize_weight import quantize_weight
from memlm.ops.w2_matmul import w2_matmul
from memlm.ops.w4_matmul import w4_matmul
from memlm.ops.w8_matmul import w8_matmul
from memlm.ops.w8a8_matmul import w8a8_matmul

MODES = ("fast", "accurate", "w8a8")
# Bits per weight -> mode.  Rounding the activations to 8 bits costs less than rounding weights to
# 4 does, but more than rounding them to 8: on SmolLM2 0.003 nats of KL, against 0.2 and 0.001.
DEFAULT_MODES = {2: "fast", 4: "fast", 8: "accurate"}

__all__ = [
    "MODES", "attention", "attention_varlen", "dequantize", "embedding", "implementations",
    "kv_append", "matmul", "matmul_topk", "paged_attention", "quantize_rows", "quantize_weight",
    "w2_matmul", "w4_matmul", "w8_matmul", "w8a8_matmul",
]  # fmt: skip


def check_mode(mode: str) -> str:
    """``mode``, or ValueError."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, accepted are {MODES}")
    return mode


def mode_for(format: Format, mode: str | None) -> str:
    """``mode``, or where it is None the default for ``format``.  Raises ValueError for others."""
    if mode is None:
        return DEFAULT_MODES[format.bits]
    if check_mode(mode) == "w8a8" and format.bits != 8:
        raise ValueError(f"mode: got 'w8a8', accepted for {format} are fast and accurate")
    return mode


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
    ``mode`` is ``"fast"``, ``"accurate"``, for 8 bits ``"w8a8"`` (:func:`w8a8_matmul`, one scale
    per row of x), or None for what ``DEFAULT_MODES`` says."""
    mode = mode_for(packed.format, mode)
    parts = (packed.codes, packed.scales, packed.offsets)
    around = (norm, eps, swiglu, residual)
    return dispatch(x, packed.format, *parts, packed.n, packed.k, bias, mode, *around)


def dispatch(x, format: Format, codes, scales, offsets, n, k, bias, mode, *around):
    """:func:`matmul` for a packed matrix in parts, and a mode that fits."""
    sizes = (n, k, format.group, bias)
    if format.bits == 8:
        if mode == "w8a8":
            return w8a8_matmul(x, None, codes, scales, *sizes, 0, *around)
        return w8_matmul(x, codes, scales, *sizes, mode == "fast", *around)
    if format.bits == 4:
        codebook = format.codebook
        return w4_matmul(x, codes, scales, offsets, *sizes, mode == "fast", *around, codebook)
    return w2_matmul(x, codes, scales, offsets, *sizes, mode == "fast", *around)
