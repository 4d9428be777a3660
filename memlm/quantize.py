"""Rounding a float matrix to a packed format, without calibration data.

For 8 bits the scale maps a group's largest magnitude to 127.  For fewer the scale (and offset)
minimise the group's squared error: a few clipping ranges are tried, each refined by the
least-squares scale for the codes it gives.  Plain round-to-nearest is among the candidates, so the
result is never worse than that.  Scales are rounded to the type they are stored in before the
codes are chosen.
"""

from __future__ import annotations

import torch

from memlm.formats import Format, Packed, pack

# Clipping candidates, as fractions of the group's range, by the number of levels.  Weights are
# bell-shaped: with 16 levels, cutting up to a third of the range off can pay, with 3 or 4 more.
_SHRINK = {16: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 4: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)}
_SHRINK[3] = _SHRINK[4]
_CHUNK = 1 << 19  # weights quantised at a time: 2 MB of f32, so that the search stays in the cache
_F16_MIN_NORMAL = 2.0**-14
_F16_MAX = 65504.0


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
        largest = float(w.detach().abs().amax())
        if not largest < float("inf"):
            raise ValueError("w: contains NaN or Inf")
        steps = 127 if format.bits == 8 else len(format.codes) - 1
        in_range = largest == 0 or (largest / steps >= _F16_MIN_NORMAL and largest <= _F16_MAX)
        scale_dtype = torch.float16 if in_range else torch.float32
        rows = max(1, _CHUNK // w.shape[1])
        parts = [_quantize_rows(chunk, format, scale_dtype) for chunk in w.detach().split(rows)]
        q, scales, offsets = zip(*parts)
        return pack(
            torch.cat(q),
            torch.cat(scales),
            None if format.symmetric else torch.cat(offsets),
            format,
        )


def _quantize_rows(w: torch.Tensor, format: Format, scale_dtype: torch.dtype):
    """Codes [rows, k], scales and offsets [rows, groups] of some rows."""
    rows, k = w.shape
    groups = format.groups(k)
    span = format.group or k
    grouped = torch.zeros(rows, groups * span, device=w.device)
    grouped[:, :k] = w
    grouped = grouped.view(rows, groups, span)
    if format.bits == 8:
        q, scales, offsets = _int8(grouped, scale_dtype)
    elif format.symmetric:
        q, scales, offsets = _symmetric(grouped, format, scale_dtype)
    else:
        # Padding must not stretch the last group's range: it repeats the row's last weight.
        grouped.view(rows, -1)[:, k:] = grouped.view(rows, -1)[:, k - 1 : k]
        q, scales, offsets = _asymmetric(grouped, format, scale_dtype)
    q = q.reshape(rows, -1)[:, :k]
    return q, scales.squeeze(-1), None if offsets is None else offsets.squeeze(-1)


def _inverse(s: torch.Tensor) -> torch.Tensor:
    return torch.where(s == 0, 0.0, 1.0 / s)


def _int8(w: torch.Tensor, scale_dtype: torch.dtype):
    scales = (w.abs().amax(-1, keepdim=True) / 127).to(scale_dtype)
    q = (w * _inverse(scales.float())).round_().clamp_(-127, 127)
    return q.to(torch.int8), scales, None


def _symmetric(w: torch.Tensor, format: Format, scale_dtype: torch.dtype):
    # Where the levels reach further on one side, the largest magnitude, of either sign, is mapped
    # to that side's end.
    levels = format.values(device=w.device)[: len(format.codes)]
    end = levels[levels.abs().argmax()]
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    best = _better(None, w, (extreme / end).to(scale_dtype), None, levels)
    for shrink in _SHRINK[len(levels)]:
        _, values = _nearest(w * _inverse(extreme * (shrink / end)), levels)
        s = (w * values).sum(-1, keepdim=True) * _inverse((values * values).sum(-1, keepdim=True))
        best = _better(best, w, s.to(scale_dtype), None, levels)
    return best[0].to(torch.uint8), best[1], None


def _asymmetric(w: torch.Tensor, format: Format, scale_dtype: torch.dtype):
    levels = format.values(device=w.device)
    steps = len(levels) - 1
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    mean = w.mean(-1, keepdim=True)
    best = _better(None, w, ((high - low) / steps).to(scale_dtype), low.to(scale_dtype), levels)
    for shrink in _SHRINK[len(levels)]:
        s, o = half * (2 * shrink / steps), middle - half * shrink
        q = ((w - o) * _inverse(s)).round_().clamp_(0, steps)
        # Least squares for (s, o) given the codes.
        q_mean = q.mean(-1, keepdim=True)
        dq = q - q_mean
        s = ((w - mean) * dq).sum(-1, keepdim=True) * _inverse((dq * dq).sum(-1, keepdim=True))
        best = _better(best, w, s.to(scale_dtype), (mean - s * q_mean).to(scale_dtype), levels)
    return best[0].to(torch.uint8), best[1], best[2]


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest of ascending ``levels``, and that level."""
    if (levels.diff() == 1).all():  # numbers: rounding is quicker than looking up
        level = x.round().clamp_(levels[0], levels[-1])
        return level - levels[0], level
    q = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return q, levels[q]


def _better(best, w: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, levels):
    """The better, group by group, of ``best`` and rounding with these stored scales."""
    s = scales.float()
    o = 0.0 if offsets is None else offsets.float()
    q, values = _nearest((w - o) * _inverse(s), levels)
    error = (values * s + o).sub_(w).square_().sum(-1, keepdim=True)
    if best is None:
        return q, scales, offsets, error
    wins = error < best[3]
    return (
        torch.where(wins, q, best[0]),
        torch.where(wins, scales, best[1]),
        None if offsets is None else torch.where(wins, offsets, best[2]),
        torch.where(wins, error, best[3]),
    )
