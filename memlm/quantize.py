"""Rounding a float matrix to a packed format, without calibration data.

For 8 bits the scale maps a group's largest magnitude to 127.  For fewer the scale (and offset)
minimise the group's squared error: a few clipping ranges are tried, each refined by the
least-squares scale for the codes it gives.  Plain round-to-nearest is among the candidates, so the
result is never worse than that.  Scales are rounded to the type they are stored in before the
codes are chosen.
"""

from __future__ import annotations

import torch

from memlm import _rounding, ops
from memlm.formats import Format, Packed
from memlm.ops._matmul import X_DTYPES


def quantize_weight(w: torch.Tensor, format: str | Format) -> Packed:
    """Quantise ``w [n, k]`` (f32, bf16, f16, f64) and pack it.

    Scales are f16; they are f32 when the largest lies outside f16's normal range (6.1e-5 to
    65,504).  Groups far below the matrix's largest may thus have subnormal f16 scales: their
    weights are off by at most 2**-25 * 15, absolutely.

    Raises TypeError for a weight that is not floating point, ValueError for one that is not a
    matrix, is empty, or holds NaN or Inf.
    """
    format = Format.parse(format)
    if not isinstance(w, torch.Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"w: got {got}, accepted is a floating-point tensor")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"w: got shape {list(w.shape)}, expected [n, k] with n, k at least 1")
    with torch.no_grad():
        w = w.detach() if w.dtype in X_DTYPES else w.detach().float()
        largest = max(float(end.abs()) for end in torch.aminmax(w))
        if not largest < float("inf"):
            raise ValueError("w: contains NaN or Inf")
        return ops.quantize_weight(w, format, _rounding.scale_dtype(torch, format, largest))
