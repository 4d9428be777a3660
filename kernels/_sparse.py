"""What the kernels over sparse matrices share (memlm/sparse_formats.py draws them): reading what is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._weight_only import _fields, _unpack, levels_on
from memlm.formats import ZEROS
from memlm.sparse_formats import SparseTensors


@triton.jit
def _block(codes, levels, block, DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr):
    """A block [32 k, 16 rows] of W: codes as numbers of DTYPE, floats as they are.  ``codes``: 32-bit words
    of codes, or floats."""
    row = tl.arange(0, 16)
    if BITS >= 16:
        w = tl.load(codes + (block * 32 + tl.arange(0, 32))[:, None] * 16 + row[None, :])
    else:
        word = tl.load(codes + (block * BITS + tl.arange(0, BITS))[None, :] * 16 + row[:, None])
        w = tl.trans(_unpack(_fields(word, BITS, 16, 32), levels, DTYPE, BITS, ZERO, LEVELS))
    return w


def block_arguments(packed: SparseTensors) -> tuple[tuple, dict]:
    """What kernels take of a W of blocks: codes, scales, offsets and levels, or None for what there is
    not; and constants."""
    codes, format = packed.codes, packed.format
    if format.is_float:
        constants = {"BITS": format.bits, "ZERO": 0, "LEVELS": False, "OFFSETS": False}
        return (codes, None, None, None), constants
    levels = levels_on(codes.device) if format.values.codebook == "nf" else None
    constants = {
        "BITS": format.bits, "ZERO": ZEROS[format.bits] if format.symmetric else 0,
        "LEVELS": levels is not None, "OFFSETS": packed.offsets is not None,
    }  # fmt: skip
    return (codes.view(torch.int32), packed.scales, packed.offsets, levels), constants


def tiles_of(starts: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """int64: the tile of each of these blocks (int64)."""
    return torch.searchsorted(starts, blocks, right=True) - 1
