"""Dynamic 8-bit codes of the numbers from -1 to 1, or from 0 to 1 (arXiv:2110.02861, section 1.3 and
dynamic quantization): about the same relative precision over seven decades.

Leading zeros of a byte say how many decades a number lies below 1; the bits behind the first one divide
its decade into equal pieces, whose middles are the levels.  ``s`` is the sign; of numbers without one its
bit belongs to the pieces:

    signed     levels   from ... to        unsigned   levels
    s1pppppp       64   1e-1 ... 1         1ppppppp      128
    s01ppppp       32   1e-2 ... 1e-1      01pppppp       64
    ...                                    ...
    s0000001        1   1e-7 ... 1e-6      0000001p        2

So number ``j``, whose highest bit is ``2^b``, stands for

    level(j) = 10^d (0.9 (j + 1/2) / 2^b - 0.8),    d = b - 6, unsigned b - 7

0 and 1 are levels beside these: 0 is ``j = 0``, unsigned ``j = 1``; 1 is ``j = 128``, unsigned 256.  Codes
ascend with their levels: signed ``127 + j`` and ``127 - j``, unsigned ``j - 1``.  There is no -1: the
nearest is -0.993.

Rounding is to the nearest level, but for one case: an unsigned number above 0 never becomes 0, so that a
second moment stays a bound on the first.  It is computed in f32, each operation rounded to nearest, and so
is the same everywhere to the last bit:

    c = how many of the 8 bounds between 0, the decades, and 1 are below x
    j = clamp(rint(x * multiply[c] + add[c]), least[c], most[c])

which takes the farther of two levels only for an x within 2^-17 x of their middle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

BLOCK = 256  # numbers that share a scale, their largest magnitude
SIGNED_ZERO = 127  # the code of 0; that of unsigned numbers is 0
DECADES = 7


@dataclass(frozen=True)
class Codebook:
    """``levels`` f32 [256], by code; ``bounds`` f32 [8], ascending; ``multiply``, ``add``, ``least``,
    ``most`` f32 [9], by how many bounds are below a number."""

    signed: bool
    levels: torch.Tensor
    bounds: torch.Tensor
    multiply: torch.Tensor
    add: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor


@functools.cache
def codebook(signed: bool) -> Codebook:
    """Of the CPU, computed in f64 and rounded once."""
    lowest = 0 if signed else 1  # b of the lowest decade
    zero, one = (0, 128) if signed else (1, 256)

    def level(j: int) -> float:
        if j in (zero, one):
            return float(j == one)
        b = j.bit_length() - 1
        return 10.0 ** (b - lowest - DECADES + 1) * (0.9 * (j + 0.5) / 2**b - 0.8)

    bounds, rows = [], [(0.0, zero, zero, zero)]
    for d in range(DECADES):
        b = d + lowest
        least, most = 2**b, 2 ** (b + 1) - 1
        below = level(least - 1 if d else zero)
        bounds.append((below + level(least)) / 2 if d or signed else 0.0)
        rows.append((2**b / (0.9 * 10.0 ** (d - DECADES + 1)), 0.8 * 2**b / 0.9 - 0.5, least, most))
    bounds.append((level(one - 1) + 1) / 2)
    rows.append((0.0, one, one, one))
    upper = [level(j) for j in range(zero, one + 1)]
    levels = [-x for x in upper[127:0:-1]] + upper if signed else upper
    tables = (torch.tensor(column, dtype=torch.float32) for column in zip(*rows))
    return Codebook(signed, torch.tensor(levels), torch.tensor(bounds), *tables)


def encode(x: torch.Tensor, signed: bool) -> torch.Tensor:
    """uint8 codes of x, f32, finite and of magnitudes up to about 1; x at least 0 unless ``signed``."""
    book = codebook(signed)
    size = x.abs()
    c = torch.bucketize(size, book.bounds.to(x.device))
    multiply, add, least, most = (
        table.to(x.device)[c] for table in (book.multiply, book.add, book.least, book.most)
    )
    j = (size * multiply + add).round().maximum(least).minimum(most)
    if signed:
        j = torch.where(x < 0, SIGNED_ZERO - j.clamp(max=SIGNED_ZERO), SIGNED_ZERO + j)
    else:
        j -= 1
    return j.to(torch.uint8)


def decode(codes: torch.Tensor, signed: bool) -> torch.Tensor:
    """f32."""
    return codebook(signed).levels.to(codes.device)[codes.long()]


def quantize(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [n]`` f32 -> codes uint8 ``[n]`` and the largest magnitude of each 256, f32
    ``[ceil(n / 256)]``.

    A block with NaN or Inf has magnitude NaN and codes of 0, and one whose largest magnitude has an
    inverse beyond f32, below 2^-127, counts as zeros."""
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if len(x) else x.new_empty(0)
    inverse = 1 / absmax
    finite = absmax < torch.inf
    usable = finite & (inverse < torch.inf)
    inverse, absmax = inverse.where(usable, 0), absmax.where(usable, 0)
    codes = encode((blocks * inverse[:, None]).where(usable[:, None], 0), signed)
    return codes.view(-1)[: len(x)], absmax.where(finite, torch.nan)


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """f32 ``[n]``: levels times their block's magnitude, rounded once."""
    return decode(codes, signed) * absmax.repeat_interleave(BLOCK)[: len(codes)]
