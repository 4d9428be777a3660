"""Rounding a float matrix to a packed format, without calibration data.

For 8 bits the scale maps a group's largest magnitude to 127.  For fewer the scale (and offset)
minimise the group's squared error: a few clipping ranges are tried, each refined by the
least-squares scale for the codes it gives.  Plain round-to-nearest is among the candidates, so the
result is never worse than that.  Scales are rounded to the type they are stored in before the
codes are chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from memlm import _rounding, ops, sparse_formats
from memlm._format import parse_format
from memlm.formats import ACT_GROUP, LANE_K, TILE_ROWS, Format, Packed, layout
from memlm.ops._matmul import X_DTYPES
from memlm.sparse_formats import FLOAT_DTYPES, SparseFormat, SparsePacked

_ROWS = 64 * TILE_ROWS  # searched for zeros at a time
_CHUNK = 64 << 20  # bytes of a mapped weight in memory at a time, with ``done``


def quantize_weight(
    w: torch.Tensor, format: str | Format, done: Callable[[torch.Tensor], None] | None = None
) -> Packed:
    """Quantise ``w [n, k]`` (f32, bf16, f16, f64) and pack it.

    ``done(rows)`` is called with the rows of a large ``w`` that have been looked at, some at a time,
    all of them twice: :func:`memlm.io.pages.release`, say.

    Scales are f16; they are f32 when the largest lies outside f16's normal range (6.1e-5 to
    65,504).  Groups far below the matrix's largest may thus have subnormal f16 scales: their
    weights are off by at most 2**-25 * 15, absolutely.

    Raises TypeError for a weight that is not floating point, ValueError for one that is not a
    matrix, is empty, or holds NaN or Inf.
    """
    format = Format.parse(format)
    _check_matrix(w)
    rows = w.shape[0]
    if done is not None:
        rows = max(1, _CHUNK // (w.shape[1] * w.element_size() * TILE_ROWS)) * TILE_ROWS
    chunks = w.detach().split(rows)
    with torch.no_grad():
        largest = 0.0
        for chunk in chunks:
            ends = [float(end.abs()) for end in torch.aminmax(_known(chunk))]
            if not max(ends) < float("inf"):  # NaN is not
                raise ValueError("w: contains NaN or Inf")
            largest = max(largest, *ends)
            if len(chunks) > 1:
                done(chunk)
        scale_dtype = _rounding.scale_dtype(torch, format, largest)
        if len(chunks) == 1:
            return ops.quantize_weight(_known(w.detach()), format, scale_dtype)
        shapes = layout(format, *w.shape, scale_dtype)
        whole = {part: w.new_empty(shape, dtype=dtype) for part, (shape, dtype) in shapes.items()}
        for i, chunk in enumerate(chunks):
            packed = ops.quantize_weight(_known(chunk), format, scale_dtype)
            tile = i * rows // TILE_ROWS
            for part, tensor in packed.tensors().items():
                whole[part][tile : tile + len(tensor)] = tensor
            done(chunk)
    return Packed(format, *w.shape, **whole)


def sparse_quantize(
    w: torch.Tensor,
    format: str | SparseFormat,
    done: Callable[[torch.Tensor], None] | None = None,
) -> SparsePacked:
    """Of ``w [n, k]`` (f32, bf16, f16, f64) what is not zero, or in a block with something that is
    not, rounded to the format's values: as :func:`quantize_weight` rounds the whole matrix, or to
    f32 or bf16.  ``done`` as there.

    Raises TypeError or ValueError as there, and ValueError for ``2:4`` where more than two of 4
    consecutive weights of a row are not zero.
    """
    format = SparseFormat.parse(format)
    if not format.is_float:
        packed = quantize_weight(w, format.values, done)
        return sparse_formats.pack_dense(packed, w.detach() != 0, format.pattern)
    _check_matrix(w)
    with torch.no_grad():
        if not torch.isfinite(w).all():
            raise ValueError("w: contains NaN or Inf")
        values = w.detach().to(FLOAT_DTYPES[format.values])
        return sparse_formats.pack(values, w.detach() != 0, None, None, format)


def lacks_zeros(w: torch.Tensor, format: SparseFormat) -> str | None:
    """Why there is nothing in ``w [n, k]`` that a sparse format leaves out, or why ``2:4`` cannot
    hold it; None where it can."""
    parts = w.detach().split(_ROWS)
    if format.pattern == "2:4":
        if all(bool((_zero_runs(rows, LANE_K).sum(2) >= 2).all()) for rows in parts):
            return None
        return "more than two of 4 consecutive weights are not zero"
    if format.pattern == "block":
        what, has = "block of 16 rows and 32 k", _has_empty_block
    else:
        what, has = "weight", lambda rows: (rows == 0).any()
    if any(bool(has(rows)) for rows in parts):
        return None
    return f"no {what} is zero: there is nothing to leave out"


def _zero_runs(rows: torch.Tensor, length: int) -> torch.Tensor:
    """``[n, k]`` -> bool ``[n, k / length, length]``: which weights are zero, those beyond k are."""
    return F.pad(rows == 0, (0, -rows.shape[1] % length), value=True).unflatten(1, (-1, length))


def _has_empty_block(rows: torch.Tensor) -> torch.Tensor:
    runs = _zero_runs(rows, ACT_GROUP).all(2)
    tiles = F.pad(runs, (0, 0, 0, -len(runs) % TILE_ROWS), value=True)
    return tiles.unflatten(0, (-1, TILE_ROWS)).all(1).any()


def pack_weight(
    w: torch.Tensor,
    format: str | Format | SparseFormat,
    done: Callable[[torch.Tensor], None] | None = None,
) -> Packed | SparsePacked:
    """:func:`quantize_weight` or :func:`sparse_quantize`, as the format wants."""
    format = parse_format(format)
    quantize = sparse_quantize if isinstance(format, SparseFormat) else quantize_weight
    return quantize(w, format, done)


def _check_matrix(w: torch.Tensor) -> None:
    if not isinstance(w, torch.Tensor) or not w.is_floating_point():
        got = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"w: got {got}, accepted is a floating-point tensor")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"w: got shape {list(w.shape)}, expected [n, k] with n, k at least 1")


def _known(w: torch.Tensor) -> torch.Tensor:
    """In a type that the kernels take."""
    return w if w.dtype in X_DTYPES else w.float()
