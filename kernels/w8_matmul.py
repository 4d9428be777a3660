"""``w8_matmul`` in Triton."""

from __future__ import annotations

from memlm.kernels._dense import matmul
from memlm.ops import _matmul


def w8_matmul(x, codes, scales, n, k, group, bias, fast, norm, eps, swiglu, residual, config=None):
    """``torch.ops.memlm.w8_matmul``; ``fast`` makes no difference."""
    packed = _matmul.packed_of(8, codes, scales, None, n, k, group)
    return matmul(x, packed, bias, norm, eps, swiglu, residual, config)
