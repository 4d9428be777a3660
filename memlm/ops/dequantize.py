"""``dequantize``: rows of a packed W as floats."""

from __future__ import annotations

import torch

from memlm import formats
from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define


def _packed(codes, scales, offsets, n, k, group) -> Packed:
    bits = 8 if codes.dtype == torch.int8 else 4
    return _matmul.packed_of(bits, codes, scales, offsets, n, k, group)


def _reference(codes, scales, offsets, n, k, group, row, rows, dtype):
    packed = _packed(codes, scales, offsets, n, k, group)
    return formats.dequantize(packed, dtype)[row : row + rows]


def _fake(codes, scales, offsets, n, k, group, row, rows, dtype):
    _packed(codes, scales, offsets, n, k, group)
    return codes.new_empty((rows, k), dtype=dtype)


_op = define("dequantize", _reference, _fake)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``W [n, k]`` of a packed matrix in ``dtype`` (f32, bf16, f16), computed in f32.

    Raises TypeError for another dtype.
    """
    if dtype not in _matmul.X_DTYPES:
        raise TypeError(f"dtype: got {dtype}, accepted are {_matmul.X_DTYPES}")
    p = packed
    return _op(p.codes, p.scales, p.offsets, p.n, p.k, p.format.group, 0, p.n, dtype)
