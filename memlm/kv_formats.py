"""How the paged cache stores keys and values: the specification, executable.

A *block* holds the keys, then the values, of ``tokens`` tokens of one key-value head of one layer.
Both are matrices in tiles of 16 rows, as packed weights are (memlm/formats.py): what the products
with queries and with softmax weights read in one stream::

    keys     rows are tokens,   k are channels:   tokens / 16 tiles
    values   rows are channels, k are tokens:     width / 16 tiles

    f32, bf16    keys                         values
                 [tokens/16, dim, 16 tokens]  [width/16, tokens, 16 channels]

    int8         [tokens/16, width/4, 16 tokens, 4]    [width/16, tokens/4, 16 channels, 4]
    int4         [tokens/16, width/32, 5 bits]         [width/16, tokens/8, 16 channels, 4]

                 4 bits: a byte has k in its low nibble, k + 4 in its high one
                 5 bits: for each 32 k
                     uint8 [4, 16, 4]   nibbles as of 4 bits
                     uint8 [8, 16/2]    fifth bits: [k/4, 16 rows, 4 k], the lowest of a byte first

    then scales  f16 [tokens/16, width/group, 16]      f16 [width/group, tokens]

    a block      | keys | values | scales of keys | scales of values |

``width`` is ``dim`` rounded up to 16, of int8 and int4 to 32; ``group`` is 64 channels where it
divides the width, else 32.  What is added are zeros before rounding.

int8 and int4 round each token by itself, the moment it comes: what is stored does not depend on how
many came with it.  First its channels go through an orthonormal Walsh-Hadamard transform, by the
largest power of two that divides the width, so that no channel sticks out (QuaRot, arXiv:2404.00456);
queries go through it too and results back, and nothing else changes.  Then each group has a scale,
the number with the largest magnitude (the first of them) being the code furthest from zero::

    8 bits    s = f16(-largest / 127)   q = round(x / s), -127..127     x = s * q
    5 bits    s = f16(-largest / 16)    q = round(x / s) + 16, 0..31    x = s * (q - 16)
    4 bits    s = f16(-largest / 8)     q = round(x / s) + 8, 0..15     x = s * (q - 8)

int4 keeps the newest block of each sequence, its *tail*, unrounded as well: as a block of bf16, whose
channels are the transformed ones, padded.  Queries in that block read it there: the nearest tokens
matter most.  (SmolLM2's perplexity, all rounded: +1.3 %; with tails: +0.1 %.)

A group with NaN or Inf, or whose scale f16 cannot hold, becomes NaN or Inf throughout.
``csrc/kv_blocks.h`` holds the same for C++.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memlm.formats import ACT_GROUP, LANE_K, TILE_ROWS

TYPES = ("f32", "bf16", "int8", "int4")
BITS = {"f32": (32, 32), "bf16": (16, 16), "int8": (8, 8), "int4": (5, 4)}  # of keys, of values
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16}
ZEROS = {8: 0, 5: 16, 4: 8}  # bits -> the code that stands for 0
LEAST = {8: -127, 5: -16, 4: -8}  # bits -> what the number of largest magnitude is rounded to
MOST_TOKENS, MOST_DIM = 256, 512


@dataclass(frozen=True)
class KvFormat:
    """Blocks of ``tokens`` tokens and heads of size ``dim``.  Raises ValueError for another type than
    ``TYPES``, tokens other than multiples of 32 to 256, a dim other than 1 to 512."""

    type: str
    tokens: int
    dim: int

    def __post_init__(self):
        if self.type not in TYPES:
            raise ValueError(f"dtype: got {self.type!r}, accepted are {TYPES}")
        if self.tokens not in range(ACT_GROUP, MOST_TOKENS + 1, ACT_GROUP):
            raise ValueError(
                f"block_tokens: got {self.tokens}, accepted are multiples of 32 to {MOST_TOKENS}"
            )
        if not 1 <= self.dim <= MOST_DIM:
            raise ValueError(f"head_dim: got {self.dim}, accepted is 1 to {MOST_DIM}")

    @property
    def index(self) -> int:
        """The type as kernels and ops number it."""
        return TYPES.index(self.type)

    @property
    def bits(self) -> tuple[int, int]:
        """Of a code, or number, of keys and of values."""
        return BITS[self.type]

    @property
    def quantized(self) -> bool:
        return self.type not in FLOATS

    @property
    def width(self) -> int:
        step = ACT_GROUP if self.quantized else TILE_ROWS
        return -(-self.dim // step) * step

    @property
    def group(self) -> int:
        return 32 if self.width % 64 else 64

    @property
    def groups(self) -> int:
        return self.width // self.group

    def sizes(self) -> dict[str, int]:
        """Bytes of each part of a block, in order."""
        key_width = self.width if self.quantized else self.dim
        sizes = {
            "keys": self.tokens * key_width * self.bits[0] // 8,
            "values": self.tokens * self.width * self.bits[1] // 8,
        }
        if self.quantized:
            sizes |= dict.fromkeys(("key_scales", "value_scales"), 2 * self.tokens * self.groups)
        return sizes

    @property
    def tail(self) -> KvFormat | None:
        """The format of tails; None where there are none."""
        return KvFormat("bf16", self.tokens, self.width) if self.type == "int4" else None

    @property
    def block_bytes(self) -> int:
        return sum(self.sizes().values())


@dataclass
class Block:
    """What blocks hold, in plain order: ``keys [..., tokens, dim]`` and ``values [..., tokens,
    width]`` as floats; or both as codes ``[..., tokens, width]`` (int8, or uint8 for fewer bits)
    with f16 ``key_scales`` and ``value_scales [..., tokens, groups]``."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


def _to_tiles(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., n, k]``, n a multiple of 16 -> its bytes in tiles, flat."""
    tiles = rows.unflatten(-2, (-1, TILE_ROWS))
    if bits > 8:
        tiles = tiles.transpose(-1, -2)
    else:
        lanes = tiles.unflatten(-1, (-1, LANE_K)).transpose(-2, -3)  # [..., k / 4, 16, 4]
        tiles = (
            lanes if bits == 8 else _joined(lanes.unflatten(-3, (-1, ACT_GROUP // LANE_K)), bits)
        )
    return tiles.contiguous().flatten(rows.dim() - 2).view(torch.uint8)


def _from_tiles(data: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of :func:`_to_tiles`."""
    tiles = data.contiguous().unflatten(-1, (n // TILE_ROWS, -1))
    if bits > 8:
        numbers = tiles.view(torch.float32 if bits == 32 else torch.bfloat16)
        return numbers.unflatten(-1, (-1, TILE_ROWS)).transpose(-1, -2).flatten(-3, -2)
    if bits == 8:
        lanes = tiles.view(torch.int8).unflatten(-1, (-1, TILE_ROWS, LANE_K))
    else:
        lanes = _split(tiles, bits)
    return lanes.transpose(-2, -3).flatten(-2).flatten(-3, -2)


def _joined(lanes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[..., runs, 8, 16, 4]`` of 4 or 5 bits -> bytes ``[..., runs, 256 or 320]``."""
    nibbles = lanes & 15
    parts = [(nibbles[..., 0::2, :, :] | nibbles[..., 1::2, :, :] << 4).flatten(-3)]
    if bits == 5:
        fifth = (lanes >> 4).flatten(-3).unflatten(-1, (-1, 8))
        shifts = torch.arange(8, dtype=torch.uint8, device=lanes.device)
        parts.append((fifth << shifts).sum(-1, dtype=torch.uint8))
    return torch.cat(parts, dim=-1)


def _split(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`_joined`, for bytes ``[..., any]``: ``[..., k / 4, 16, 4]``."""
    size = ACT_GROUP * TILE_ROWS // 2
    runs = tiles.unflatten(-1, (-1, size + (size // 4 if bits == 5 else 0)))
    pairs = runs[..., :size].unflatten(-1, (-1, 1, TILE_ROWS, LANE_K))
    lanes = torch.cat((pairs & 15, pairs >> 4), dim=-3).flatten(-4, -3)
    if bits == 5:
        shifts = torch.arange(8, dtype=torch.uint8, device=tiles.device)
        fifth = runs[..., size:, None] >> shifts & 1
        lanes = lanes | (fifth.flatten(-2) << 4).unflatten(-1, (-1, TILE_ROWS, LANE_K))
    return lanes.flatten(-4, -3)


def pack(format: KvFormat, block: Block) -> torch.Tensor:
    """uint8 ``[..., block_bytes]``."""
    matrices = (block.keys, block.values.transpose(-1, -2))
    parts = [_to_tiles(x, bits) for x, bits in zip(matrices, format.bits)]
    if format.quantized:
        key_scales = block.key_scales.unflatten(-2, (-1, TILE_ROWS)).transpose(-1, -2)
        value_scales = block.value_scales.transpose(-1, -2)
        parts.append(key_scales.contiguous().flatten(-3).view(torch.uint8))
        parts.append(value_scales.contiguous().flatten(-2).view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack(format: KvFormat, blocks: torch.Tensor) -> Block:
    """The inverse of :func:`pack`, for ``blocks`` uint8 ``[..., block_bytes]``."""
    keys, values, *scales = blocks.split(list(format.sizes().values()), dim=-1)
    keys = _from_tiles(keys, format.bits[0], format.tokens)
    values = _from_tiles(values, format.bits[1], format.width).transpose(-1, -2)
    if not format.quantized:
        return Block(keys, values)
    key_scales, value_scales = (s.contiguous().view(torch.float16) for s in scales)
    key_scales = key_scales.unflatten(-1, (-1, format.groups, TILE_ROWS)).transpose(-1, -2)
    value_scales = value_scales.unflatten(-1, (format.groups, -1)).transpose(-1, -2)
    return Block(keys, values, key_scales.flatten(-3, -2), value_scales)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of ``x [..., n]``, n a multiple of 32, its own inverse,
    in pieces of the largest power of two that divides n; rounded as the kernels round."""
    n = x.shape[-1]
    size = n & -n
    both = torch.arange(16)[:, None] & torch.arange(16)
    odd = (both ^ both >> 1 ^ both >> 2 ^ both >> 3) & 1
    signs = (1 - 2 * odd).to(x)
    sixteens = x.unflatten(-1, (-1, 16))
    x = torch.zeros_like(sixteens)
    for j in range(16):
        x = x + sixteens[..., j : j + 1] * signs[j]
    x = x.flatten(-2)
    for step in (1 << i for i in range(4, size.bit_length() - 1)):
        pairs = x.unflatten(-1, (-1, 2, step))
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    root = torch.tensor(size, dtype=torch.float32).sqrt()
    return x * (1 / root).to(x.dtype)


def quantize(format: KvFormat, x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values of tokens ``x [..., dim]``, in ``bits`` bits -> codes ``[..., width]``, scales
    ``[..., groups]``, as in :class:`Block`."""
    padded = torch.nn.functional.pad(x.float(), (0, format.width - format.dim))
    groups = hadamard(padded).unflatten(-1, (-1, format.group))
    at = groups.abs().argmax(-1, keepdim=True)  # the first of equals; NaN before all
    scales = (groups.gather(-1, at) / LEAST[bits]).half()
    steps = scales.float()
    codes = torch.where(steps != 0, groups * (1 / steps), 0.0).nan_to_num(0.0)
    codes = codes.clamp(LEAST[bits], 127 if bits == 8 else -LEAST[bits] - 1).round() + ZEROS[bits]
    codes = codes.to(torch.int8 if bits == 8 else torch.uint8)
    return codes.flatten(-2), scales.squeeze(-1)


def rotated(
    format: KvFormat, codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """What codes stand for, ``[..., width]``: keys or values after the Hadamard transform."""
    numbers = codes.to(dtype) - ZEROS[bits]
    return (numbers.unflatten(-1, (-1, format.group)) * scales[..., None].to(dtype)).flatten(-2)


def read(
    format: KvFormat, blocks: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[..., tokens, dim]`` of ``blocks`` uint8 ``[..., block_bytes]``."""
    block = unpack(format, blocks)
    if not format.quantized:
        return block.keys.to(dtype), block.values[..., : format.dim].to(dtype)
    keys = rotated(format, block.keys, block.key_scales, format.bits[0], dtype)
    values = rotated(format, block.values, block.value_scales, format.bits[1], dtype)
    return hadamard(keys)[..., : format.dim], hadamard(values)[..., : format.dim]
