"""w2_matmul, w4_matmul and w8_matmul: which way they go."""

from __future__ import annotations

from functools import partial

import torch
import triton

from memlm.formats import Packed
from memlm.kernels import _unpacked
from memlm.kernels._weight_only import weight_only
from memlm.kernels.dequantize import rows_of


def matmul(
    x: torch.Tensor, packed: Packed, bias, norm, eps: float, swiglu: bool, residual,
    config: triton.Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """By the kernel of few rows, as it always is in a given ``config``, or by that of torch."""
    if config is None and _unpacked.are_many(x, packed):
        return _unpacked.product(x, packed, bias, norm, eps, swiglu, residual, partial(rows_of, packed))
    return weight_only(x, packed, bias, norm, eps, swiglu, residual, config)
