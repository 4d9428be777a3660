"""``embedding``: rows of a packed W, by index."""

from __future__ import annotations

import torch

from memlm import formats
from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define


def _reference(ids, codes, scales, offsets, bits, codebook, n, k, group, dtype):
    packed = _matmul.packed_with(codes, scales, offsets, bits, codebook, n, k, group)
    return formats.dequantize(packed, dtype)[ids]


def _fake(ids, codes, scales, offsets, bits, codebook, n, k, group, dtype):
    _matmul.packed_with(codes, scales, offsets, bits, codebook, n, k, group)
    return codes.new_empty((*ids.shape, k), dtype=dtype)


_op = define("embedding", _reference, _fake)


def embedding(
    ids: torch.Tensor, packed: Packed, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``W[ids]`` for int64 ``ids [...]`` in 0..n-1 and a packed ``W [n, k]``: ``[..., k]`` in
    ``dtype`` (f32, bf16, f16).  Only the rows asked for are dequantised.

    Raises TypeError for another dtype of ids or result, ValueError for ids on another device than
    W; an id out of range raises RuntimeError on the CPU, as torch.nn.functional.embedding does.
    """
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids: got {got}, expected a tensor of torch.int64")
    if dtype not in _matmul.X_DTYPES:
        raise TypeError(f"dtype: got {dtype}, accepted are {_matmul.X_DTYPES}")
    if ids.device != packed.codes.device:
        raise ValueError(f"ids: on {ids.device}, but the weights are on {packed.codes.device}")
    return _op(ids, *_matmul.weight_arguments(packed), dtype)
