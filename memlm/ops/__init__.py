"""The operations: fused kernels over packed weights, as torch ops."""

from __future__ import annotations

import torch

from memlm import formats
from memlm.formats import Packed
from memlm.ops import _matmul


def matmul(x, packed: Packed, bias=None, mode: str = "fast"):
    _matmul.check(x, packed, bias)
    return _matmul.reference(x, packed, bias, mode == "fast")


def embedding(ids, packed: Packed, dtype=torch.float32):
    return formats.dequantize(packed, dtype)[ids]


def dequantize(packed: Packed, dtype=torch.float32):
    return formats.dequantize(packed, dtype)
