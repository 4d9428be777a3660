"""The rounding of weights behind :mod:`memlm.quantize` (torch tensors) and :mod:`memlm.arrays`
(numpy arrays): one source for both.  ``xp`` is the module, torch or numpy, that arrays belong to.

Both give the same bits: every step is exact or rounds once as IEEE 754 says, and sums are taken in
an order of their own.
"""

from __future__ import annotations

from memlm._format import Format

# Clipping candidates, as fractions of the group's range, by the number of levels.  Weights are
# bell-shaped: with 16 levels, cutting up to a third of the range off can pay, with 3 or 4 more.
_SHRINK = {16: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 4: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)}
_SHRINK[3] = _SHRINK[4]
_CHUNK = 1 << 19  # weights quantised at a time: 2 MB of f32, so that the search stays in the cache
_F16_MIN_NORMAL = 2.0**-14
_F16_MAX = 65504.0
_F32_MIN_NORMAL = 2.0**-126


def scale_dtype(xp, format: Format, largest: float):
    """The type of the scales of a matrix with this largest magnitude: f16 where it suits."""
    steps = 127 if format.bits == 8 else len(format.codes) - 1
    in_range = largest == 0 or (largest / steps >= _F16_MIN_NORMAL and largest <= _F16_MAX)
    return xp.float16 if in_range else xp.float32


def chunk_rows(k: int) -> int:
    """Rows of a matrix that are best quantised at a time."""
    return max(1, _CHUNK // k)


def columns(format: Format, k: int) -> int:
    """Weights in all groups of a row."""
    return format.groups(k) * (format.group or k)


def quantize_rows(xp, padded, k: int, format: Format, dtype):
    """Codes [rows, k], scales and offsets (or None) [rows, groups] in ``dtype`` of some rows,
    f32 [rows, columns(format, k)] with anything beyond k, which is overwritten."""
    rows, groups = padded.shape[0], format.groups(k)
    # Padding must not stretch the last group's range: where 0 could, it repeats the last weight.
    padded[:, k:] = 0 if format.symmetric else padded[:, k - 1 : k]
    # A column for each group: sums and ranges over a group then run over whole rows, which is fast.
    w = xp.empty_like(padded).reshape(-1, rows * groups)
    w[:] = padded.reshape(rows * groups, -1).T
    if format.bits == 8:
        q, scales, offsets = _int8(xp, w, dtype)
    elif format.symmetric:
        q, scales, offsets = _symmetric(xp, w, format, dtype)
    else:
        q, scales, offsets = _asymmetric(xp, w, format, dtype)
    q = _to(q, xp.int8 if format.bits == 8 else xp.uint8).T.reshape(rows, -1)[:, :k]
    scales = scales.reshape(rows, groups)
    return q, scales, None if offsets is None else offsets.reshape(rows, groups)


def _to(x, dtype):
    return x.astype(dtype, copy=False) if hasattr(x, "astype") else x.to(dtype)


def _inverse(xp, s):
    """1 / s; 0 for subnormal s, whose inverse may not be finite: its weights become 0."""
    return xp.where(abs(s) < _F32_MIN_NORMAL, 0.0, 1.0 / s)


def _round(xp, q, low: float, high: float):
    """In place, and returned."""
    return xp.clip(xp.round(q, out=q), low, high, out=q)


def _sum(x):
    """Of each column, of a power of two elements: halves are added until one is left."""
    while (half := x.shape[0] // 2) > 0:
        x = x[:half] + x[half:]
    return x


def _range(xp, w):
    return xp.amin(w, axis=0, keepdims=True), xp.amax(w, axis=0, keepdims=True)


def _int8(xp, w, dtype):
    low, high = _range(xp, w)
    scales = _to(xp.maximum(-low, high) / 127, dtype)
    inverse = _inverse(xp, _to(scales, xp.float32))
    return _round(xp, w * inverse, -127, 127), scales, None


def _symmetric(xp, w, format, dtype):
    # Where the levels reach further on one side, the largest magnitude, of either sign, is mapped
    # to that side's end.
    levels = format.levels[: len(format.codes)]
    end = max(levels, key=abs)
    low, high = _range(xp, w)
    extreme = xp.where(-low > high, low, high)
    nearest = _nearest(xp, w, levels)
    best = _better(xp, None, w, _to(extreme / end, dtype), None, nearest)
    for shrink in _SHRINK[len(levels)]:
        _, values = nearest(w * _inverse(xp, extreme * (shrink / end)))
        s = _sum(w * values) * _inverse(xp, _sum(values * values))
        best = _better(xp, best, w, _to(s, dtype), None, nearest)
    return best[:3]


def _asymmetric(xp, w, format, dtype):
    steps, span = len(format.levels) - 1, w.shape[0]
    low, high = _range(xp, w)
    middle, half = (low + high) / 2, (high - low) / 2
    mean = _sum(w) / span
    nearest = _nearest(xp, w, format.levels)
    best = _better(xp, None, w, _to((high - low) / steps, dtype), _to(low, dtype), nearest)
    for shrink in _SHRINK[len(format.levels)]:
        s, o = half * (2 * shrink / steps), middle - half * shrink
        q, _ = nearest((w - o) * _inverse(xp, s))
        # Least squares for (s, o) given the codes.
        q_mean = _sum(q) / span
        dq = q - q_mean
        s = _sum((w - mean) * dq) * _inverse(xp, _sum(dq * dq))
        o = mean - s * q_mean
        best = _better(xp, best, w, _to(s, dtype), _to(o, dtype), nearest)
    return best[:3]


def _nearest(xp, like, levels: tuple[float, ...]):
    """A function: x, which it may overwrite, -> codes of the nearest of ascending ``levels``, and
    these levels."""
    first, last = levels[0], levels[-1]
    if last - first == len(levels) - 1:  # numbers: rounding is quicker than looking up

        def nearest(x):
            values = _round(xp, x, first, last)
            return (values - first if first else values), values

        return nearest
    table = xp.empty_like(like[: len(levels), 0])  # like w: on its device
    for code, level in enumerate(levels):
        table[code] = level
    bounds = (table[1:] + table[:-1]) / 2

    def nearest(x):
        q = xp.searchsorted(bounds, x)
        return q, xp.take(table, q)

    return nearest


def _better(xp, best, w, scales, offsets, nearest):
    """The better, group by group, of ``best`` and rounding with these stored scales."""
    s = _to(scales, xp.float32)
    o = 0.0 if offsets is None else _to(offsets, xp.float32)
    q, values = nearest((w - o) * _inverse(xp, s))
    error = values * s
    error += o
    error -= w
    error *= error
    error = _sum(error)
    if best is None:
        return q, scales, offsets, error
    wins = error < best[3]
    return (
        xp.where(wins, q, best[0]),
        xp.where(wins, scales, best[1]),
        None if offsets is None else xp.where(wins, offsets, best[2]),
        xp.where(wins, error, best[3]),
    )
