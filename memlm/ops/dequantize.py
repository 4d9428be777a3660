"""``dequantize``: rows of a packed W as floats."""

from __future__ import annotations

import torch

from memlm import formats, sparse_formats
from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define
from memlm.ops.w4_sparse_dequantize import w4_sparse_dequantize
from memlm.sparse_formats import SparsePacked


def _reference(codes, scales, offsets, bits, codebook, n, k, group, row, rows, dtype):
    packed = _matmul.packed_with(codes, scales, offsets, bits, codebook, n, k, group)
    return formats.dequantize(packed, dtype)[row : row + rows]


def _fake(codes, scales, offsets, bits, codebook, n, k, group, row, rows, dtype):
    _matmul.packed_with(codes, scales, offsets, bits, codebook, n, k, group)
    return codes.new_empty((rows, k), dtype=dtype)


_op = define("dequantize", _reference, _fake)


def dequantize(
    packed: Packed | SparsePacked, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``W [n, k]`` of a packed matrix in ``dtype`` (f32, bf16, f16), computed in f32.

    Raises TypeError for another dtype.
    """
    if dtype not in _matmul.X_DTYPES:
        raise TypeError(f"dtype: got {dtype}, accepted are {_matmul.X_DTYPES}")
    if isinstance(packed, SparsePacked):
        if packed.format.pattern == "block":
            return sparse_formats.dequantize(packed, dtype)
        return w4_sparse_dequantize(packed, 0, packed.n, dtype)
    return _op(*_matmul.weight_arguments(packed), 0, packed.n, dtype)
