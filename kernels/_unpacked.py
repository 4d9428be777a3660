"""Products of many rows: torch's, with W unpacked to x's type, a panel of features at a time, as
csrc/torch/unpacked.h does and says why."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from memlm.kernels._rows import rms_norm
from memlm.ops import _matmul

MANY_ROWS = 128
# Enough features to keep a GPU busy, and whole tiles of torch's product.
PANEL_BYTES, PANEL_UNIT = 128 << 20, 256


def are_many(x: torch.Tensor, packed) -> bool:
    """Whether there are many rows, in a type of 16 bits that holds the weights."""
    fits = x.dtype == torch.bfloat16 or x.dtype == packed.scales.dtype == torch.float16
    return fits and x.numel() // packed.k >= MANY_ROWS


def product(
    x: torch.Tensor, packed, bias, norm, eps: float, swiglu: bool, residual,
    unpack: Callable[[int, int, torch.dtype], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The product and the layers around it, as memlm.ops.w4_matmul documents it; ``unpack(row, rows, dtype)``
    gives rows of W."""
    shape = _matmul.check(x, packed, bias, norm, swiglu, residual)
    rows = x.reshape(-1, packed.k)
    if norm is not None:
        rows = rms_norm(rows if rows.stride(1) == 1 else rows.contiguous(), norm, eps)
    panel = max(PANEL_BYTES // 2 // packed.k // PANEL_UNIT, 1) * PANEL_UNIT
    parts = []
    for first in range(0, packed.n, panel):
        here = min(panel, packed.n - first)
        part = None if bias is None else bias[first : first + here]
        parts.append(F.linear(rows, unpack(first, here, x.dtype), part))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    y = y.view(shape)
    return y if residual is None else y + residual
