"""The rounding of weights: what the kernel (csrc/cpu/quantize_weight-inl.h) computes, bit for bit,
and what runs where there is none.  ``xp`` is the module, torch or numpy, that arrays belong to.

All give the same bits: every step is exact or rounds once as IEEE 754 says, and sums are taken in
order.
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
    w += 0.0  # -0.0 becomes 0.0: which of the two a range has as its end is left open
    low, high = xp.amin(w, axis=0, keepdims=True), xp.amax(w, axis=0, keepdims=True)
    if format.symmetric:
        top, stored = xp.where(-low > high, low, high), _Stored(xp, dtype)
    else:
        top, middle = high * 0.5 - low * 0.5, low * 0.5 + high * 0.5
        w -= middle
        stored = _Stored(xp, dtype, middle)
    top = stored.normalise(w, top)
    if format.bits == 8:
        nearest = rounder(xp, w, tuple(range(-127, 128)))
        scales, offsets = stored.scales(abs(top) / 127), None
    else:
        nearest = rounder(xp, w, format.levels[: len(format.codes)])
        scales, offsets = _search(xp, w, top, stored, nearest, format)
    _, q = nearest(positions(xp, w, *stored.loaded(scales, offsets)))
    q = _to(q, xp.int8 if format.bits == 8 else xp.uint8).T.reshape(rows, -1)[:, :k]
    scales = scales.reshape(rows, groups)
    return q, scales, None if offsets is None else offsets.reshape(rows, groups)


def _to(x, dtype):
    return x.astype(dtype, copy=False) if hasattr(x, "astype") else x.to(dtype)


class _Stored:
    """Scales and offsets in the type that they are stored in, of groups that are computed with in
    units of their own, powers of two, about the middle of their range (0: symmetric ones).  So no
    square or sum under- or overflows, however small or large the weights are."""

    def __init__(self, xp, dtype, middle=None):
        self.xp, self.dtype, self.middle = xp, dtype, middle

    def normalise(self, w, top):
        """Takes the units of groups with these largest magnitudes, applies them to ``w``, in
        place, and to ``top``, which is returned."""
        xp = self.xp
        power = (top.view(xp.int32) & 0x7F800000).view(xp.float32)  # 2^e <= |top| < 2^(e+1)
        self.unit = xp.clip(power, _F32_MIN_NORMAL, 1 / _F32_MIN_NORMAL)
        self.inverse = 1.0 / self.unit
        w *= self.inverse
        return top * self.inverse

    def scales(self, s):
        return _to(s * self.unit, self.dtype)

    def offsets(self, o):
        return None if self.middle is None else _to(o * self.unit + self.middle, self.dtype)

    def loaded(self, scales, offsets):
        """Stored ones as numbers of the group's unit."""
        f32 = self.xp.float32
        o = 0.0 if offsets is None else (_to(offsets, f32) - self.middle) * self.inverse
        return _to(scales, f32) * self.inverse, o


def _search(xp, w, top, stored, nearest, format):
    """The scales and offsets, stored, with the least squared error that were found."""
    span, levels = w.shape[0], format.levels[: len(format.codes)]
    # From the lowest to the highest code; or, where the levels reach further on one side, to that
    # side's end the largest magnitude, of either sign.
    reach = max(levels, key=abs) if format.symmetric else levels[-1] / 2
    total = 0.0 if format.symmetric else _sum(w)
    best, least = (stored.scales(top * (1 / reach)), stored.offsets(-top)), xp.inf
    best, least = _better(xp, w, stored, nearest, best, least, *best)
    for shrink in _SHRINK[len(levels)]:
        s, o = top * (shrink / reach), 0.0 if format.symmetric else top * -shrink
        values, _ = nearest(positions(xp, w, s, o))
        # Least squares for s, and o, given the codes.
        dot, squares = _sum(w * values), _sum(values * values)
        if not format.symmetric:
            count = _sum(values)
            mean = count * (1 / span)
            dot = dot - total * mean
            squares = squares - count * mean
        s = dot * _inverse(xp, squares)
        o = 0.0 if format.symmetric else total * (1 / span) - s * mean
        found = stored.scales(s), stored.offsets(o)
        best, least = _better(xp, w, stored, nearest, best, least, *found)
    return best


def _better(xp, w, stored, nearest, best, least, scales, offsets):
    """The better, group by group, of ``best`` and these, and its error."""
    s, o = stored.loaded(scales, offsets)
    x = w - o
    error, _ = nearest(x * _inverse(xp, s))
    error = error * s
    error -= x
    error *= error
    error = _sum(error)
    wins = error < least
    best = (
        xp.where(wins, scales, best[0]),
        None if offsets is None else xp.where(wins, offsets, best[1]),
    )
    return best, xp.where(wins, error, least)


def positions(xp, w, s, o):
    """Where weights lie among levels of this scale and offset."""
    return (w - o) * _inverse(xp, s)


def _inverse(xp, s):
    """1 / s; 0 for subnormal s, whose inverse may not be finite: its weights become 0."""
    return xp.where(abs(s) < _F32_MIN_NORMAL, 0.0, 1.0 / s)


def _sum(x):
    """Of each column, from the first element to the last."""
    total = 0.0
    for row in x:
        total = total + row
    return total[None]


def rounder(xp, like, levels: tuple[float, ...]):
    """A function: x, which it may overwrite, -> the nearest of ascending ``levels``, and their
    codes."""
    first, last = levels[0], levels[-1]
    if last - first == len(levels) - 1:  # numbers: rounding is quicker than looking up

        def nearest(x):
            values = xp.clip(xp.round(x, out=x), first, last, out=x)
            return values, (values if first == -127 else values - first)

        return nearest
    table = xp.empty_like(like[: len(levels), 0])  # like w: on its device
    for code, level in enumerate(levels):
        table[code] = level
    bounds = (table[1:] + table[:-1]) / 2

    def nearest(x):
        q = xp.searchsorted(bounds, x)
        return xp.take(table, q), q

    return nearest
