"""What kv_append and paged_attention share: a block's numbers, how work is dealt out to sequences whose
sizes the host does not know, and the step of a Hadamard transform."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from memlm.kv_formats import KvFormat

TILE = tl.constexpr(16)  # tokens of a tile of keys, channels of one of values


@dataclass(frozen=True)
class Layout:
    """A KvFormat as kernels take it, a constant of theirs.  ``channels`` are those that keys have.

    Products go through ``groups`` times ``group`` channels; of codes those share a scale.  ``values`` and
    ``block`` are counted in numbers, or in bytes of codes; the scales' places in f16.  ``piece``: channels
    that a Hadamard transform mixes, 1 where there is none; ``root``: 1 / sqrt(piece), f32.
    """

    tokens: int
    dim: int
    channels: int
    width: int
    key_bits: int
    value_bits: int
    values: int
    key_scales: int
    value_scales: int
    block: int
    piece: int
    root: float

    @property
    def coded(self) -> bool:
        return self.key_bits <= 8

    @property
    def group(self) -> int:
        return 64 if -(-self.width // 32) % 2 == 0 else 32

    @property
    def groups(self) -> int:
        return -(-self.width // self.group)


def layout_of(format: KvFormat) -> Layout:
    sizes = format.sizes()
    unit = 1 if format.quantized else format.bits[0] // 8
    values, codes = sizes["keys"] // unit, (sizes["keys"] + sizes["values"]) // 2
    piece = format.width & -format.width if format.quantized else 1
    return Layout(
        tokens=format.tokens, dim=format.dim, channels=format.width if format.quantized else format.dim,
        width=format.width, key_bits=format.bits[0], value_bits=format.bits[1], values=values,
        key_scales=codes, value_scales=codes + sizes.get("key_scales", 0) // 2,
        block=format.block_bytes // unit, piece=piece,
        root=(1 / torch.tensor(piece, dtype=torch.float32).sqrt()).item(),
    )  # fmt: skip


VIEWS = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8, "int4": torch.uint8}


def check_aligned(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError for blocks that do not begin at a multiple of 16 bytes."""
    for name, x in tensors.items():
        if x is not None and x.data_ptr() % 16:
            raise ValueError(f"{name}: got an address of {x.data_ptr() % 16} modulo 16, must be 16-byte aligned")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x [tokens, heads, dim]`` with its heads side by side; rows may lie apart."""
    dense = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if dense else x.contiguous()


# ---- Work.  Sequence s has the items from rows[s] * TIMES / PER + s * MORE on.  With n new tokens it has at
# least n * TIMES / PER, rounded up, and MORE - 1 above that.  So the host, which knows all rows, knows how
# many there are. ----


def items(rows: int, sequences: int, times: int, per: int, more: int) -> int:
    return rows * times // per + sequences * more


@triton.jit
def first_item(row, sequence, TIMES: tl.constexpr, PER: tl.constexpr, MORE: tl.constexpr):
    return row * TIMES // PER + sequence * MORE


@triton.jit
def sequence_of(rows, sequences, item, TIMES: tl.constexpr, PER: tl.constexpr, MORE: tl.constexpr):
    """The sequence that has an item; the last one for items beyond all."""
    begun = 0
    for start in range(0, sequences, 128):
        s = start + tl.arange(0, 128)
        first = first_item(tl.load(rows + s, s < sequences, 0), s, TIMES, PER, MORE)
        begun += tl.sum(((s < sequences) & (first <= item)).to(tl.int32), 0)
    return begun - 1


# ---- Numbers ----


@triton.jit
def butterfly(x, STEP: tl.constexpr):
    """a + b and a - b, of channels a and b that are STEP apart."""
    ROWS: tl.constexpr = x.shape[0]
    CHANNELS: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, [ROWS, CHANNELS // (2 * STEP), 2, STEP])
    first = tl.arange(0, 2)[None, None, :, None] == 0
    plus = tl.sum(pairs, 2, keep_dims=True)
    minus = tl.sum(tl.where(first, pairs, -pairs), 2, keep_dims=True)
    return tl.reshape(tl.where(first, plus, minus), [ROWS, CHANNELS])
