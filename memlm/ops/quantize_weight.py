"""``quantize_weight``: a float W to packed codes, scales and offsets."""

from __future__ import annotations

import torch

from memlm import _rounding, formats
from memlm.formats import Format, Packed
from memlm.ops._matmul import CODEBOOKS, X_DTYPES, codebook_index
from memlm.ops._registry import define


def _check(w, bits, codebook, group, has_offsets, scale_dtype):
    """The format and its layout, or TypeError or ValueError naming what does not fit."""
    if not isinstance(w, torch.Tensor) or w.dtype not in X_DTYPES:
        got = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"w: got {got}, accepted are tensors of {X_DTYPES}")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"w: got shape {list(w.shape)}, expected [n, k] with n, k at least 1")
    format = Format(bits, group, not has_offsets, CODEBOOKS[codebook])
    return format, formats.layout(format, *w.shape, scale_dtype)


def _reference(w, bits, codebook, group, has_offsets, scale_dtype):
    format, _ = _check(w, bits, codebook, group, has_offsets, scale_dtype)
    chunks = w.split(_rounding.chunk_rows(w.shape[1]))
    q, scales, offsets = zip(*(_quantize_rows(chunk, format, scale_dtype) for chunk in chunks))
    offsets = torch.cat(offsets) if has_offsets else None
    packed = formats.pack(torch.cat(q), torch.cat(scales), offsets, format)
    none = w.new_empty(0, dtype=scale_dtype)
    return packed.codes, packed.scales, packed.offsets if has_offsets else none


def _quantize_rows(w: torch.Tensor, format: Format, scale_dtype: torch.dtype):
    rows, k = w.shape
    padded = torch.empty(rows, _rounding.columns(format, k), device=w.device)
    padded[:, :k] = w
    return _rounding.quantize_rows(torch, padded, k, format, scale_dtype)


def _fake(w, bits, codebook, group, has_offsets, scale_dtype):
    _, layout = _check(w, bits, codebook, group, has_offsets, scale_dtype)
    parts = {"offsets": ((0,), scale_dtype), **layout}
    order = ("codes", "scales", "offsets")
    return tuple(w.new_empty(parts[name][0], dtype=parts[name][1]) for name in order)


_op = define("quantize_weight", _reference, _fake)


def quantize_weight(w: torch.Tensor, format: Format, scale_dtype: torch.dtype) -> Packed:
    """``w [n, k]`` (f32, bf16, f16) of finite numbers, rounded to ``format`` with scales of
    ``scale_dtype`` (f16, f32): :func:`memlm.quantize_weight`, which looks at the numbers first.
    The codes of others are not specified.  No gradient.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    codebook = codebook_index(format.codebook)
    given = (w, format.bits, codebook, format.group, not format.symmetric, scale_dtype)
    _check(*given)
    codes, scales, offsets = _op(*given)
    return Packed(format, *w.shape, codes, scales, None if format.symmetric else offsets)
