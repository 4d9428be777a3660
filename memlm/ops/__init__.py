"""The operations: fused kernels over packed weights, as torch ops (``torch.ops.memlm.*``)."""

from __future__ import annotations

import torch

from memlm._format import DEFAULT_MODES
from memlm.formats import Format, Packed
from memlm.ops._registry import implementations
from memlm.ops.adamw_8bit import adamw_8bit
from memlm.ops.attention import attention, attention_varlen
from memlm.ops.block_sparse_matmul import block_sparse_matmul
from memlm.ops.dequantize import dequantize
from memlm.ops.embedding import embedding
from memlm.ops.kv_append import kv_append
from memlm.ops.linear_cross_entropy import linear_cross_entropy
from memlm.ops.matmul_topk import matmul_topk
from memlm.ops.paged_attention import paged_attention
from memlm.ops.quantize_rows import quantize_rows
from memlm.ops.quantize_weight import quantize_weight
from memlm.ops.w2_matmul import w2_matmul
from memlm.ops.w4_matmul import w4_matmul
from memlm.ops.w4_sparse_dequantize import w4_sparse_dequantize
from memlm.ops.w4_sparse_matmul import w4_sparse_matmul
from memlm.ops.w8_matmul import w8_matmul
from memlm.ops.w8a8_matmul import w8a8_matmul
from memlm.sparse_formats import SparseFormat, SparsePacked

MODES = ("fast", "accurate", "w8a8")

__all__ = [
    "MODES", "adamw_8bit", "attention", "attention_varlen", "block_sparse_matmul", "dequantize",
    "embedding", "implementations", "kv_append", "linear_cross_entropy", "matmul", "matmul_topk",
    "paged_attention", "quantize_rows", "quantize_weight", "w2_matmul", "w4_matmul",
    "w4_sparse_dequantize", "w4_sparse_matmul", "w8_matmul", "w8a8_matmul",
]  # fmt: skip


def check_mode(mode: str) -> str:
    """``mode``, or ValueError."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, accepted are {MODES}")
    return mode


def mode_for(format: Format | SparseFormat, mode: str | None) -> str:
    """``mode``, or where it is None the default for ``format``.  Raises ValueError for others."""
    if mode is None:
        return DEFAULT_MODES[format.bits]
    rows = isinstance(format, Format) and format.bits == 8
    if check_mode(mode) == "w8a8" and not rows:
        raise ValueError(f"mode: got 'w8a8', accepted for {format} are fast and accurate")
    return mode


def matmul(
    x: torch.Tensor,
    packed: Packed | SparsePacked,
    bias: torch.Tensor | None = None,
    mode: str | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + bias`` by the operation that fits ``packed.format``: see :func:`w4_matmul`,
    and for sparse matrices :func:`block_sparse_matmul` and :func:`w4_sparse_matmul`.
    ``mode`` is ``"fast"``, ``"accurate"``, for 8 bits ``"w8a8"`` (:func:`w8a8_matmul`, one scale
    per row of x), or None for what ``DEFAULT_MODES`` says."""
    mode = mode_for(packed.format, mode)
    parts = (packed.codes, packed.scales, packed.offsets)
    around = (norm, eps, swiglu, residual)
    if isinstance(packed, SparsePacked):
        parts = (*parts, packed.starts, packed.places, packed.n, packed.k)
        return dispatch_sparse(x, packed.format, *parts, bias, mode, *around)
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


def dispatch_sparse(
    x, format: SparseFormat, codes, scales, offsets, starts, places, n, k, bias, mode, *around
):
    """:func:`matmul` for a sparse matrix in parts, and a mode that fits."""
    values, rest = format.values, (n, k, bias, mode == "fast", *around)
    if format.is_float:
        return block_sparse_matmul(x, starts, places, codes, None, None, format.bits, *rest)
    codebook = "nf" if values.codebook == "nf" else "int"  # to the kernels ternary codes are numbers
    if format.pattern == "block":
        parts = (starts, places, codes, scales, offsets, format.bits)
        return block_sparse_matmul(x, *parts, *rest, codebook)
    rest = (n, k, values.group, *rest[2:])
    return w4_sparse_matmul(x, codes, places, starts, scales, format.pattern, *rest, codebook)
