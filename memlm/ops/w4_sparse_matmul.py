"""``w4_sparse_matmul``: y = x W^T + bias over 4-bit weights of which two in four, or any, are stored."""

from __future__ import annotations

import torch

from memlm import sparse_formats
from memlm.ops import _matmul
from memlm.ops.w4_sparse_dequantize import WEIGHTS, pattern_number, weights_of
from memlm.sparse_formats import SparsePacked, SparseTensors

ARGUMENTS = (
    "x codes places starts scales pattern codebook n k group bias fast norm eps swiglu residual"
)  # as the schema


def _of(given: dict, kind: type = SparsePacked):
    return weights_of(kind, *(given[name] for name in WEIGHTS))


def _reference(given: dict) -> torch.Tensor:
    around = (given[key] for key in ("bias", "fast", "norm", "eps", "swiglu", "residual"))
    return _matmul.reference(given["x"], sparse_formats.to_dense(_of(given)), *around)


def _fake(given: dict) -> torch.Tensor:
    around = (given[key] for key in ("bias", "norm", "swiglu", "residual"))
    return _matmul.fake(given["x"], _of(given, SparseTensors), *around)


def _grad_x(grad: torch.Tensor, given: dict) -> torch.Tensor:
    weights = tuple(given[name] for name in WEIGHTS)
    return _matmul.grad_x(grad, lambda *rows: torch.ops.memlm.w4_sparse_dequantize(*weights, *rows))


_op = _matmul.define("w4_sparse_matmul", ARGUMENTS, _reference, _fake, _grad_x)


def w4_sparse_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    starts: torch.Tensor | None,
    scales: torch.Tensor,
    pattern: str,
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
    """``x W^T + bias`` for ``x [..., k]`` (f32, bf16, f16) and a ``W [n, k]`` of 4-bit weights of
    which only some are stored, the others zero; returns ``[..., n]`` in x's dtype.

    ``pattern`` is ``"2:4"``, two of each 4 consecutive k of a row (``starts`` None), or
    ``"unstructured"``, a bitmap; ``codes``, ``places``, ``starts`` and ``scales`` are laid out as
    ``memlm/sparse_formats.py`` draws.  The kernel puts the stored codes where they belong as it
    loads them, and multiplies as the dense one does: fewer bytes are read, as many products are
    computed.

    ``group``, ``codebook``, ``fast``, bias, norm, eps, swiglu and residual are as for
    :func:`memlm.ops.w4_matmul`, and so are gradients.

    Raises TypeError, ValueError or FormatError naming the argument that does not fit.
    """
    number = pattern_number(pattern)
    book = 0 if codebook == "int" else _matmul.codebook_index(codebook)
    weights = (codes, places, starts, scales, number, book, n, k, group)
    try:
        return _op(x, *weights, bias, fast, norm, eps, swiglu, residual)
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        _matmul.check(x, weights_of(SparsePacked, *weights), bias, norm, swiglu, residual)
        raise
