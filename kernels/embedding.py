"""``embedding`` in Triton."""

from __future__ import annotations

import torch

from memlm.kernels.dequantize import rows_of
from memlm.ops import _matmul


def embedding(ids, codes, scales, offsets, bits, codebook, n, k, group, dtype) -> torch.Tensor:
    """``torch.ops.memlm.embedding``.  An id out of range gives a row of NaN: to raise, the host would
    have to wait for the device."""
    packed = _matmul.packed_with(codes, scales, offsets, bits, codebook, n, k, group)
    flat = ids.reshape(-1).contiguous()
    return rows_of(packed, 0, len(flat), dtype, flat).view(*ids.shape, k)
