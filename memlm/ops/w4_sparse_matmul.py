"""``w4_sparse_matmul``: y = x W^T + bias over 4-bit weights of which two in four, or any, are stored."""

from __future__ import annotations

import torch

from memlm import sparse_formats
from memlm.formats import CODEBOOKS, Format
from memlm.ops import _matmul
from memlm.sparse_formats import SparseFormat, SparsePacked, SparseTensors

ARGUMENTS = (
    "x codes places starts scales pattern codebook n k group bias fast norm eps swiglu residual"
)  # as the schema
_WEIGHTS = "codes places starts scales pattern codebook n k group".split()
_PATTERNS = {"2:4": 1, "unstructured": 2}  # memlm_pattern, csrc/include/memlm.h
_NAMES = {number: name for name, number in _PATTERNS.items()}


def pattern_number(name: str) -> int:
    """What the op calls it.  Raises ValueError for others."""
    if name not in _PATTERNS:
        raise ValueError(f"pattern: got {name!r}, accepted are {list(_PATTERNS)}")
    return _PATTERNS[name]


def _weights(kind: type, codes, places, starts, scales, pattern, codebook, n, k, group):
    """The op's arguments as ``kind``: SparsePacked, or SparseTensors, whose contents are unknown."""
    if pattern not in _NAMES:
        raise ValueError(f"pattern: got {pattern}, accepted are {_NAMES}")
    values = Format(4, group, codebook=list(CODEBOOKS)[codebook])
    format = SparseFormat(_NAMES[pattern], values)
    return kind(format, n, k, codes, scales, None, starts, places)


def _of(given: dict, kind: type = SparsePacked):
    return _weights(kind, *(given[name] for name in _WEIGHTS))


def _reference(given: dict) -> torch.Tensor:
    around = (given[key] for key in ("bias", "fast", "norm", "eps", "swiglu", "residual"))
    return _matmul.reference(given["x"], sparse_formats.to_dense(_of(given)), *around)


def _fake(given: dict) -> torch.Tensor:
    around = (given[key] for key in ("bias", "norm", "swiglu", "residual"))
    return _matmul.fake(given["x"], _of(given, SparseTensors), *around)


@torch.library.custom_op("memlm::w4_sparse_dequantize", mutates_args=())
def _dequantize(
    codes: torch.Tensor,
    places: torch.Tensor,
    starts: torch.Tensor | None,
    scales: torch.Tensor,
    pattern: int,
    codebook: int,
    n: int,
    k: int,
    group: int,
    row: int,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``rows`` rows of W from ``row`` on, a multiple of 16: for the gradient."""
    packed = _weights(SparsePacked, codes, places, starts, scales, pattern, codebook, n, k, group)
    sizes = [size for size in (row, rows, n - row - rows) if size]
    part = sparse_formats.split_rows(packed, sizes)[1 if row else 0]
    return sparse_formats.dequantize(part, dtype)


@_dequantize.register_fake
def _(codes, places, starts, scales, pattern, codebook, n, k, group, row, rows, dtype):
    return codes.new_empty(rows, k, dtype=dtype)


def _grad_x(grad: torch.Tensor, given: dict) -> torch.Tensor:
    weights = tuple(given[name] for name in _WEIGHTS)
    return _matmul.grad_x(grad, lambda *rows: _dequantize(*weights, *rows))


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
        _matmul.check(x, _weights(SparsePacked, *weights), bias, norm, swiglu, residual)
        raise
