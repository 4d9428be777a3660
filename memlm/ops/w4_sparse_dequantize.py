"""``w4_sparse_dequantize``: rows of a W of 4-bit weights of which two in four, or any, are stored, as
floats."""

from __future__ import annotations

import torch

from memlm.formats import CODEBOOKS, Format
from memlm import sparse_formats
from memlm.ops._registry import define
from memlm.sparse_formats import SparseFormat, SparsePacked, SparseTensors

WEIGHTS = "codes places starts scales pattern codebook n k group".split()
_PATTERNS = {"2:4": 1, "unstructured": 2}  # memlm_pattern, csrc/include/memlm.h
_NAMES = {number: name for name, number in _PATTERNS.items()}


def pattern_number(name: str) -> int:
    """What the op calls it.  Raises ValueError for others."""
    if name not in _PATTERNS:
        raise ValueError(f"pattern: got {name!r}, accepted are {list(_PATTERNS)}")
    return _PATTERNS[name]


def weights_of(kind: type, codes, places, starts, scales, pattern, codebook, n, k, group):
    """The op's arguments as ``kind``: SparsePacked, or SparseTensors, whose contents are unknown."""
    if pattern not in _NAMES:
        raise ValueError(f"pattern: got {pattern}, accepted are {_NAMES}")
    values = Format(4, group, codebook=list(CODEBOOKS)[codebook])
    format = SparseFormat(_NAMES[pattern], values)
    return kind(format, n, k, codes, scales, None, starts, places)


def _reference(*arguments) -> torch.Tensor:
    *weights, row, rows, dtype = arguments
    return sparse_formats.dequantize(weights_of(SparsePacked, *weights), dtype)[row : row + rows]


def _fake(codes, *arguments):
    *weights, _, rows, dtype = arguments
    return codes.new_empty(rows, weights_of(SparseTensors, codes, *weights).k, dtype=dtype)


_op = define("w4_sparse_dequantize", _reference, _fake)


def w4_sparse_dequantize(
    packed: SparsePacked, row: int, rows: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows ``row .. row + rows - 1`` of a ``W [n, k]`` of pattern 2:4 or unstructured, ``[rows, k]``
    in ``dtype`` (f32, bf16, f16), computed in f32.

    Raises RuntimeError for rows that W has not, or another dtype.
    """
    values = packed.format.values
    parts = (packed.codes, packed.places, packed.starts, packed.scales)
    book = list(CODEBOOKS).index(values.codebook)
    numbers = (pattern_number(packed.format.pattern), book, packed.n, packed.k, values.group)
    return _op(*parts, *numbers, row, rows, dtype)
