"""How the paged cache stores keys and values: the specification, executable.

A *block* holds the keys, then the values, of ``tokens`` tokens of one key-value head of one layer.
Both are matrices in tiles of 16 rows, as packed weights are (memlm/formats.py): what the products
with queries and with softmax weights read in one stream::

    keys     rows are tokens,   k are channels:   tokens / 16 tiles
    values   rows are channels, k are tokens:     width / 16 tiles

    f32, bf16    keys                         values
                 [tokens/16, dim, 16 tokens]  [width/16, tokens, 16 channels]

    int8         keys                                  values
                 [tokens/16, width/4, 16 tokens, 4]    [width/16, tokens/4, 16 channels, 4]
    int4         [tokens/16, width/8, 16 tokens, 4]    [width/16, tokens/8, 16 channels, 4]
                 a byte: k in its low nibble, k + 4 in its high one

    then scales  f16 [tokens/16, width/group, 16]      f16 [width/group, tokens]
                 of keys                               of values

    a block      | keys | values | scales of keys | scales of values |

``width`` is ``dim`` rounded up to 16, of int8 and int4 to 32; ``group`` is 64 channels where it
divides the width, else 32.  What is added are zeros before rounding.

int8 and int4 round each token by itself, the moment it comes: what is stored does not depend on how
many came with it.  First its channels go through an orthonormal Walsh-Hadamard transform, by the
largest power of two that divides the width, so that no channel sticks out (QuaRot, arXiv:2404.00456);
queries go through it too and results back, and nothing else changes.  Then each group has a scale,
the number with the largest magnitude (the first of them) being the code furthest from zero::

    int8    s = f16(-largest / 127)   q = round(x / s), -127..127    x = s * q
    int4    s = f16(-largest / 8)     q = round(x / s) + 8, 0..15    x = s * (q - 8)

A group with NaN, or with a number beyond 127 (8) times f16's largest, becomes NaN.
``csrc/kv_blocks.h`` holds the same for C++.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memlm.formats import ACT_GROUP, LANE_K, TILE_ROWS

TYPES = ("f32", "bf16", "int8", "int4")
BITS = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16}
FURTHEST = {"int8": 127, "int4": 8}  # the code of the largest magnitude, without its sign
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
        keys = self.width if self.quantized else self.dim
        sizes = {
            "keys": self.tokens * keys * BITS[self.type] // 8,
            "values": self.tokens * self.width * BITS[self.type] // 8,
        }
        if self.quantized:
            sizes |= dict.fromkeys(("key_scales", "value_scales"), 2 * self.tokens * self.groups)
        return sizes

    @property
    def block_bytes(self) -> int:
        return sum(self.sizes().values())


@dataclass
class Block:
    """What blocks hold, in plain order: ``keys [..., tokens, dim]`` and ``values [..., tokens,
    width]`` as floats; or both as codes ``[..., tokens, width]`` (int8: int8; int4: uint8, 0..15)
    with f16 ``key_scales`` and ``value_scales [..., tokens, groups]``."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


def _to_tiles(rows: torch.Tensor, type: str) -> torch.Tensor:
    """``[..., n, k]``, n a multiple of 16 -> its bytes in tiles, flat."""
    tiles = rows.unflatten(-2, (-1, TILE_ROWS))
    if type in FLOATS:
        tiles = tiles.transpose(-1, -2)
    else:
        per_byte = 8 // BITS[type]
        lanes = tiles.unflatten(-1, (-1, per_byte, LANE_K))  # [..., tiles, 16, k / 4n, n, 4]
        lanes = lanes.movedim(-4, -2)  # [..., tiles, k / 4n, n, 16, 4]
        tiles = (
            lanes.squeeze(-3) if per_byte == 1 else lanes.select(-3, 0) | lanes.select(-3, 1) << 4
        )
    return tiles.contiguous().flatten(rows.dim() - 2).view(torch.uint8)


def _from_tiles(data: torch.Tensor, type: str, n: int) -> torch.Tensor:
    """The inverse of :func:`_to_tiles`."""
    if type in FLOATS:
        tiles = data.contiguous().view(FLOATS[type]).unflatten(-1, (n // TILE_ROWS, -1, TILE_ROWS))
        return tiles.transpose(-1, -2).flatten(-3, -2)
    tiles = data.unflatten(-1, (n // TILE_ROWS, -1, TILE_ROWS, LANE_K))
    if BITS[type] == 8:
        lanes = tiles.view(torch.int8).unsqueeze(-3)
    else:
        lanes = torch.stack((tiles & 15, tiles >> 4), dim=-3)
    return lanes.movedim(-2, -4).flatten(-3).flatten(-3, -2)


def pack(format: KvFormat, block: Block) -> torch.Tensor:
    """uint8 ``[..., block_bytes]``."""
    parts = [_to_tiles(x, format.type) for x in (block.keys, block.values.transpose(-1, -2))]
    if format.quantized:
        key_scales = block.key_scales.unflatten(-2, (-1, TILE_ROWS)).transpose(-1, -2)
        value_scales = block.value_scales.transpose(-1, -2)
        parts.append(key_scales.contiguous().flatten(-3).view(torch.uint8))
        parts.append(value_scales.contiguous().flatten(-2).view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack(format: KvFormat, blocks: torch.Tensor) -> Block:
    """The inverse of :func:`pack`, for ``blocks`` uint8 ``[..., block_bytes]``."""
    keys, values, *scales = blocks.split(list(format.sizes().values()), dim=-1)
    keys = _from_tiles(keys, format.type, format.tokens)
    values = _from_tiles(values, format.type, format.width).transpose(-1, -2)
    if not format.quantized:
        return Block(keys, values)
    key_scales, value_scales = (s.contiguous().view(torch.float16) for s in scales)
    key_scales = key_scales.unflatten(-1, (-1, format.groups, TILE_ROWS)).transpose(-1, -2)
    value_scales = value_scales.unflatten(-1, (format.groups, -1)).transpose(-1, -2)
    return Block(keys, values, key_scales.flatten(-3, -2), value_scales)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of ``x [..., n]``, its own inverse, in pieces of the
    largest power of two that divides n; rounded as the kernels round."""
    n = x.shape[-1]
    size = n & -n
    steps = [step for step in (8, 4, 2, 1) if step < size]
    steps += [1 << i for i in range(4, size.bit_length() - 1)]
    for step in steps:
        pairs = x.unflatten(-1, (-1, 2, step))
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    root = torch.tensor(size, dtype=torch.float32).sqrt()
    return x * (1 / root).to(x.dtype)


def quantize(format: KvFormat, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values of tokens ``x [..., dim]`` -> codes ``[..., width]``, scales ``[..., groups]``,
    as in :class:`Block`."""
    padded = torch.nn.functional.pad(x.float(), (0, format.width - format.dim))
    groups = hadamard(padded).unflatten(-1, (-1, format.group))
    most = FURTHEST[format.type]
    at = groups.abs().argmax(-1, keepdim=True)  # the first of equals; NaN before all
    scales = (-groups.gather(-1, at) / most).half()
    steps = scales.float()
    codes = torch.where(steps != 0, groups * (1 / steps), 0.0).nan_to_num(0.0)
    codes = codes.clamp(-most, 127 if format.type == "int8" else 7).round()
    codes = codes.to(torch.int8) if format.type == "int8" else (codes + 8).to(torch.uint8)
    return codes.flatten(-2), scales.squeeze(-1)


def dequantize(
    format: KvFormat, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The inverse of :func:`quantize`, but for what rounding lost: ``[..., dim]`` in ``dtype``."""
    return hadamard(rotated(format, codes, scales, dtype))[..., : format.dim]


def rotated(
    format: KvFormat, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What codes stand for, ``[..., width]``: keys or values after the Hadamard transform."""
    numbers = codes.to(dtype) - (8 if format.type == "int4" else 0)
    return (numbers.unflatten(-1, (-1, format.group)) * scales[..., None].to(dtype)).flatten(-2)


def read(
    format: KvFormat, blocks: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[..., tokens, dim]`` of ``blocks`` uint8 ``[..., block_bytes]``."""
    block = unpack(format, blocks)
    if not format.quantized:
        return block.keys.to(dtype), block.values[..., : format.dim].to(dtype)
    keys = dequantize(format, block.keys, block.key_scales, dtype)
    return keys, dequantize(format, block.values, block.value_scales, dtype)
