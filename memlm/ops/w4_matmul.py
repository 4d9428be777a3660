"""``w4_matmul``: y = x W^T + bias over 4-bit weights."""

from __future__ import annotations

import torch

from memlm.ops import _matmul

ARGUMENTS = (
    "x codes scales offsets codebook n k group bias fast norm eps swiglu residual"  # as the schema
)
_op = _matmul.define_weight_only("w4_matmul", 4, ARGUMENTS)


def w4_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    bias: torch.Tensor | None = None,
    fast: bool = True,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    codebook: str = "int",
) -> torch.Tensor:
    """``x W^T + bias`` for ``x [..., k]`` (f32, bf16, f16) and a packed 4-bit ``W [n, k]``;
    returns ``[..., n]`` in x's dtype.

    ``codes``, ``scales``, ``offsets`` are laid out as ``memlm/formats.py`` draws; ``group`` is 32,
    64 or 128; ``codebook`` is ``"int"``, or ``"nf"`` for NF4; ``bias [n]`` has x's dtype.  An empty
    batch gives an empty result; x may have any strides.

    ``fast=False``: weights are dequantised, products and sums are f32; the error is that of an f32
    matmul with the dequantised weights.  (With AMX, from :func:`memlm.cpu.tile_rows` rows on,
    numbers are cut into three bf16: what lies below 2**-110 loses digits.)

    ``fast=True``: x is rounded to int8 with one scale per 32 consecutive k, products are exact
    integers, sums f32; x is off by at most 1/254 of the largest of its 32, and the levels of NF4 by
    1/254.  With AMX, from ``tile_rows`` rows on, x and the dequantised weights are rounded to
    bf16 instead (each off by at most 1/256 of itself).  A row of x that holds Inf or NaN gives NaN.

    On a GPU (f16, bf16) ``fast`` makes no difference: x is multiplied by the codes as they are, sums of 32
    are f32 and multiplied by the scale; NF4's levels are rounded to x's dtype.  From 128 rows on W is rounded
    to x's dtype instead, and torch computes it and the layers around it (docs/gpu.md).

    The layers around the product can be part of it, in f32 and without a pass over memory of
    their own: ``norm [k]`` with ``eps`` puts RMSNorm before it (arXiv:1910.07467); with ``swiglu``
    W holds the rows of a gate above as many of another projection (n / 2 is a multiple of 16), and
    the result ``[..., n / 2]`` is ``silu(gate) * other`` (arXiv:2002.05202); ``residual``, shaped as
    the result, is added to it last.

    Differentiable with respect to x, bias, norm and residual; the packed weights are frozen.  On
    devices without a kernel the plain torch reference runs, with a warning.

    Raises TypeError, ValueError or FormatError naming the argument that does not fit.
    """
    book = 0 if codebook == "int" else _matmul.codebook_index(codebook)
    try:
        return _op(
            x, codes, scales, offsets, book, n, k, group, bias, fast, norm, eps, swiglu, residual
        )
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        packed = _matmul.packed_of(4, codes, scales, offsets, n, k, group, book)
        _matmul.check(x, packed, bias, norm, swiglu, residual)
        raise
