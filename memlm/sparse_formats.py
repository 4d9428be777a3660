"""The packed formats of matrices with many zeros: the specification, executable.

``W[n, k]`` is stored as :mod:`memlm.formats` draws, without most of its zeros.  ``pattern`` says
where weights may stand, ``values`` what they are: a format of memlm.formats, or f32 or bf16::

    block          16 rows x 32 k each, whole or not at all    any format of group 32, f32, bf16
    2:4            at most two of 4 consecutive k of a row     int4 and nf4, symmetric
    unstructured   anywhere                                    int4 and nf4, symmetric

Names have both: ``block/int4a-g32``, ``block/f32``, ``2:4/int4-g64``, ``unstructured/nf4-g64``;
``block/int4``, ``2:4/int4`` and so on mean ``SPARSE_DEFAULTS``.

What is stored goes by the weights before they are rounded; scales are those of the dense matrix
with its zeros.  So the sparse and the dense matrix hold the same numbers, but that a zero among
asymmetric codes of a block stays what it is there.  What is not stored is exactly 0.

Layout, version 1
-----------------
Tiles are the dense format's, 16 rows each, and so is ``K``: k rounded up to a multiple of 32 and of
the group.  Tensors are ``codes``, ``scales`` and ``offsets`` (like scales, asymmetric only),
``starts`` and ``places``.

**block**.  A block is what the dense kernels multiply at a time, 16 rows and 32 k, with one scale
for each row.  Larger blocks of zeros are so many of these. ::

    starts  int64 [tiles + 1]    tile t has the blocks starts[t] .. starts[t + 1] - 1
    places  int32 [blocks]       block b begins at k = 32 * places[b]; ascending within a tile
    codes   uint8 [blocks, bits, 16, 4] (8 bits: int8): the dense codes of its 32 k, `bits` of the
            64-byte blocks that memlm.formats draws
            f32 or bf16 [blocks, 32, 16]: codes[b, j, r] is row r, k j; there are no scales
    scales  f16 or f32 [blocks, 16]

    W, 48 x 96                      starts  0 2 2 3
      tile 0   | b0 |    | b1 |     places  0 2 1
      tile 1   |    |    |    |
      tile 2   |    | b2 |    |

**2:4**.  Of 4 k two have a code, those that are not zero and then the first others, with the code
of zero; p0 < p1 are where they stand, 0 to 3. ::

    codes   uint8 [tiles, K/4, 16]   row r: the code at p0 in the low nibble, at p1 in the high one
    places  uint8 [tiles, K/4, 8]    row r: p0 | p1 << 2
    scales  f16 or f32 [tiles, groups, 16], as dense

    the 8 bytes of places, and the row that each nibble belongs to:
      byte            0     1     2      3    4     5     6      7
      low nibble      0     4     8     12    1     5     9     13
      high nibble     2     6    10     14    3     7    11     15

    one row of W, 4 k:   0  -3  0  2  with scale 1, int4:  codes 0xa5, places 1 | 3 << 2

As one little-endian number of 64 bits, row r's place is at ``(r % 2) * 32 + (r // 2) * 4``.

**unstructured**.  A bitmap, and the codes that it has a bit for. ::

    places  uint8 [tiles, K/4, 8]    as one little-endian number of 64 bits: bit 4 r + j says that
                                     row r, k j of the 4 is stored; none beyond n or k is
    codes   uint8 [bytes + 64]       the stored codes of each 16 x 4, in the order of the bits, the
                                     low nibble first, padded to whole bytes; one 16 x 4 behind the
                                     other along k, tile by tile; then 64 bytes that a kernel may
                                     load, but not use, zero when packed
    starts  int64 [tiles + 1]        the byte of codes at which each tile begins, and their end
    scales  f16 or f32 [tiles, groups, 16], as dense

    bit          0    1    2    3    4    5   ...  63
    row, k     0, 0 0, 1 0, 2 0, 3 1, 0 1, 1     15, 3

Codes are the dense ones: 0 to 15, where 8 is zero, or 7 with nf4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from memlm import formats
from memlm._format import (
    ACT_GROUP, FLOATS, LANE_K, PATTERNS, SPARSE_DEFAULTS, TILE_ROWS, SparseFormat,
)  # fmt: skip
from memlm.errors import FormatError
from memlm.formats import SCALE_DTYPES, Packed, from_tiles, joined, to_tiles

__all__ = [
    "FLOATS", "FLOAT_DTYPES", "OVERRUN", "PATTERNS", "SPARSE_DEFAULTS", "SparseFormat",
    "SparsePacked", "SparseTensors", "check", "check_layout", "dequantize", "layout", "pack",
    "pack_dense", "positions", "split_rows", "stack_rows", "to_dense", "unpack",
]  # fmt: skip

FLOAT_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
OVERRUN = 64  # bytes behind the codes of an unstructured matrix
_CHUNK = 1 << 22  # weights picked at a time, so that what is computed with stays small
# Bit j of the index: the j-th of 4 k is stored -> p0 | p1 << 2; more than two: _TOO_MANY.
_TOO_MANY = 16
_PLACES = []
for _mask in range(16):
    _kept = [j for j in range(4) if _mask >> j & 1]
    _p = sorted((_kept + [j for j in range(4) if j not in _kept])[:2])
    _PLACES.append(_TOO_MANY if len(_kept) > 2 else _p[0] | _p[1] << 2)


@dataclass(frozen=True, eq=False)
class SparseTensors:
    """The tensors of a sparse ``W[n, k]``, as :func:`check_layout` wants them; what they say may be
    unknown, as when a graph is traced."""

    format: SparseFormat
    n: int
    k: int
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def __post_init__(self):
        check_layout(self.format, self.n, self.k, self.tensors())

    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("codes", "scales", "offsets", "starts", "places")
        parts = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def tiles(self) -> int:
        return -(-self.n // TILE_ROWS)


@dataclass(frozen=True, eq=False)
class SparsePacked(SparseTensors):
    """A sparse matrix ``W[n, k]`` in the layout that this module draws.

    Checked when made (FormatError), with all that a kernel relies on, so that whoever holds a
    ``SparsePacked`` may hand its memory to one.
    """

    def __post_init__(self):
        check(self.format, self.n, self.k, self.tensors())


def layout(
    format: SparseFormat, n: int, k: int, stored: int = 0, scale_dtype: torch.dtype = torch.float16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors of a sparse ``W[n, k]``.  ``stored``: how many blocks,
    or for ``unstructured`` bytes of codes (without the last 64); ``2:4`` needs no such number."""
    if n < 1 or k < 1:
        raise ValueError(f"shape: got n={n}, k={k}, both must be at least 1")
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype: got {scale_dtype}, accepted are {SCALE_DTYPES}")
    tiles, fours = -(-n // TILE_ROWS), format.padded_k(k) // LANE_K
    starts = ((tiles + 1,), torch.int64)
    if format.pattern == "block":
        places = ((stored,), torch.int32)
        if format.is_float:
            codes = ((stored, ACT_GROUP, TILE_ROWS), FLOAT_DTYPES[format.values])
            return {"codes": codes, "starts": starts, "places": places}
        code_dtype = torch.int8 if format.bits == 8 else torch.uint8
        codes = ((stored, format.bits, TILE_ROWS, LANE_K), code_dtype)
        scales = ((stored, TILE_ROWS), scale_dtype)
        parts = {"codes": codes, "scales": scales}
        if not format.symmetric:
            parts["offsets"] = scales
        return {**parts, "starts": starts, "places": places}
    places = ((tiles, fours, 8), torch.uint8)
    scales = ((tiles, format.values.groups(k), TILE_ROWS), scale_dtype)
    if format.pattern == "2:4":
        codes = ((tiles, fours, TILE_ROWS), torch.uint8)
        return {"codes": codes, "scales": scales, "places": places}
    codes = ((stored + OVERRUN,), torch.uint8)
    return {"codes": codes, "scales": scales, "starts": starts, "places": places}


def stored(format: SparseFormat, codes: torch.Tensor) -> int:
    """What :func:`layout` calls so, of these codes."""
    if format.pattern == "2:4":
        return 0
    return len(codes) - (OVERRUN if format.pattern == "unstructured" else 0)


def expected(format: SparseFormat, n: int, k: int, density: float) -> int:
    """What :func:`layout` calls ``stored``, of weights of which this share is not zero."""
    tiles, padded = -(-n // TILE_ROWS), format.padded_k(k)
    if format.pattern == "block":
        return round(density * (tiles * padded // ACT_GROUP))
    if format.pattern == "2:4":
        return 0
    # Two in a byte, and on average half a one for nothing in each 16 x 4 that has some.
    return round((n * k * density + (tiles * padded // LANE_K) * (density > 0) / 2) / 2)


def density(packed: SparsePacked) -> float:
    """The share of the weights that is stored, padding and filling zeros included."""
    places = packed.places
    if packed.format.pattern == "2:4":
        return 0.5
    if packed.format.pattern == "block":
        whole = packed.tiles * packed.format.padded_k(packed.k) // ACT_GROUP
        return len(places) / whole
    return int(_counts(_words(places)).sum()) / (packed.n * packed.k)


def check_stored(format: SparseFormat, n: int, k: int, stored: int) -> int:
    """``stored``; ValueError where it is no such number for a ``W[n, k]``."""
    tiles, padded = -(-n // TILE_ROWS), format.padded_k(k)
    most = {
        "block": tiles * padded // ACT_GROUP,
        "2:4": 0,
        "unstructured": tiles * padded * TILE_ROWS // 2,
    }[format.pattern]
    if type(stored) is not int or not 0 <= stored <= most:
        raise ValueError(f"stored: got {stored!r:.80}, accepted for {format} are 0 to {most}")
    return stored


def check_layout(format: SparseFormat, n: int, k: int, tensors: dict[str, torch.Tensor]) -> None:
    """Raises FormatError unless ``tensors`` have names, shapes and dtypes as :func:`layout` says,
    and are contiguous.  What is in them it leaves open."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise FormatError(f"{name}: got {type(tensor).__name__}, accepted are tensors")
    scales = tensors.get("scales")
    scale_dtype = torch.float16 if scales is None else scales.dtype
    if scale_dtype not in SCALE_DTYPES:
        raise FormatError(f"scales: got {scale_dtype}, accepted are tensors of {SCALE_DTYPES}")
    counted, extra = ("places", 0) if format.pattern == "block" else ("codes", OVERRUN)
    counts = tensors.get(counted)
    stored = 0 if counts is None or counts.dim() == 0 else max(0, counts.shape[0] - extra)
    formats.check_tensors(format, n, k, tensors, layout(format, n, k, stored, scale_dtype))


def check(format: SparseFormat, n: int, k: int, tensors: dict[str, torch.Tensor]) -> None:
    """Raises FormatError unless ``tensors`` are a sparse ``W[n, k]``: as :func:`check_layout`, and
    with starts and places that point into it, each at one weight, in order."""
    check_layout(format, n, k, tensors)
    starts, places = tensors.get("starts"), tensors["places"]
    if format.pattern == "block":
        _check_blocks(starts, places, format.padded_k(k) // ACT_GROUP)
    elif format.pattern == "2:4":
        _check_pairs(places)
    else:
        _check_bitmap(starts, places, n, k, tensors["codes"].shape[0] - OVERRUN)


def _check_blocks(starts: torch.Tensor, places: torch.Tensor, columns: int) -> None:
    blocks = places.shape[0]
    if int(starts[0]) != 0 or int(starts[-1]) != blocks or bool((starts[1:] < starts[:-1]).any()):
        raise FormatError(f"starts: must ascend from 0 to {blocks}, the number of blocks")
    if blocks == 0:
        return
    low, high = (int(end) for end in torch.aminmax(places))
    if low < 0 or high >= columns:
        raise FormatError(f"places: got {low}..{high}, accepted are 0..{columns - 1}")
    ascending = places[1:] > places[:-1]
    first = starts[1:-1]  # of a tile: may be below the last of the tile before
    ascending[first[(first > 0) & (first < blocks)] - 1] = True
    if not bool(ascending.all()):
        raise FormatError("places: must ascend within a tile, each once")


def _check_pairs(places: torch.Tensor) -> None:
    # Bits of all 16 pairs of a number at a time: p0 is b1 b0, p1 is b3 b2, and p0 < p1.
    b0 = _words(places)
    b1, b2, b3 = b0 >> 1, b0 >> 2, b0 >> 3
    ordered = (b3 & ~b1) | (~(b3 ^ b1) & b2 & ~b0)
    every = 0x1111111111111111
    if not bool((ordered & every == every).all()):
        raise FormatError("places: must have p0 < p1")


def _check_bitmap(starts, places, n: int, k: int, stored: int) -> None:
    words = _words(places)
    rows = n - (words.shape[0] - 1) * TILE_ROWS  # of the last tile
    beyond = False if rows == TILE_ROWS else bool((words[-1] >> LANE_K * rows).any())
    four, j = divmod(k, LANE_K)
    if j:
        tail = sum(0x1111111111111111 << i for i in range(j, LANE_K))
        beyond |= bool((words[:, four] & (tail - (1 << 64) if tail >> 63 else tail)).any())
        four += 1
    if beyond or bool(words[:, four:].any()):
        raise FormatError(f"places: has weights beyond the {n}x{k} of the matrix")
    wanted = _ends((_counts(words) + 1 >> 1).sum(1))
    if not torch.equal(starts, wanted):
        raise FormatError("starts: must be the bytes of codes that places have bits for, added up")
    if int(starts[-1]) != stored:
        raise FormatError(
            f"codes: got {stored + OVERRUN} bytes, expected {int(starts[-1]) + OVERRUN}"
        )


def _words(places: torch.Tensor) -> torch.Tensor:
    """uint8 [tiles, K/4, 8] as int64 [tiles, K/4]."""
    if places.storage_offset() % 8:
        places = places.clone()
    return places.view(torch.int64)[..., 0]


def _counts(words: torch.Tensor) -> torch.Tensor:
    """How many bits of each int64 are set."""
    # Counted side by side in fields of 2, 4, 8 and so on bits; the mask drops copies of the sign.
    for shift, mask in (
        (1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F),
        (8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF),
    ):  # fmt: skip
        words = (words & mask) + (words >> shift & mask)
    return words


def _ends(counts: torch.Tensor) -> torch.Tensor:
    """[tiles] -> [tiles + 1]: where each begins when they lie one behind the other, and the end."""
    ends = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=ends[1:])
    return ends


def pack(
    q: torch.Tensor,
    keep: torch.Tensor,
    scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    format: str | SparseFormat,
) -> SparsePacked:
    """Codes ``q [n, k]``, scales and offsets ``[n, groups]`` as :func:`memlm.formats.pack` takes
    them, of which ``keep [n, k]`` (bool) says what is stored.  Floats are given as ``q``, of the
    format's dtype, without scales.  A block is stored whole where any of it is to be kept.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    format = SparseFormat.parse(format)
    if not format.is_float:
        packed = formats.pack(q, scales, offsets, format.values)
        return pack_dense(packed, keep, format.pattern)
    for name, given in (("scales", scales), ("offsets", offsets)):
        if given is not None:
            raise ValueError(f"{name}: got a tensor, {format} has none")
    if q.dim() != 2 or q.numel() == 0:
        raise ValueError(f"q: got shape {list(q.shape)}, expected [n, k] with n, k at least 1")
    if q.dtype != FLOAT_DTYPES[format.values]:
        raise TypeError(f"q: got {q.dtype}, expected {FLOAT_DTYPES[format.values]} for {format}")
    _check_keep(keep, *q.shape)
    parts = []
    for rows in _row_chunks(*q.shape):
        blocks = to_tiles(q[rows], format.padded_k(q.shape[1])).unflatten(1, (-1, ACT_GROUP))
        parts.append(_picked(format, len(q[rows]), q.shape[1], keep[rows], codes=blocks))
    return stack_rows(parts)


def pack_dense(packed: Packed, keep: torch.Tensor, pattern: str) -> SparsePacked:
    """What of a dense matrix ``keep [n, k]`` (bool) says is stored, in ``pattern``.

    Raises TypeError or ValueError naming the argument that does not fit; for ``2:4`` where more
    than two of 4 are to be kept.
    """
    format = SparseFormat(pattern, packed.format)
    _check_keep(keep, packed.n, packed.k)
    pick = {"block": _pick_blocks, "2:4": _pick_pairs, "unstructured": _pick_bitmap}[pattern]
    chunks = _row_chunks(packed.n, packed.k)
    dense = formats.split_rows(packed, [len(keep[rows]) for rows in chunks])
    return stack_rows([pick(part, keep[rows], format) for part, rows in zip(dense, chunks)])


def _check_keep(keep: torch.Tensor, n: int, k: int) -> None:
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: got {keep.dtype}, expected torch.bool")
    if tuple(keep.shape) != (n, k):
        raise ValueError(f"keep: got shape {list(keep.shape)}, expected {[n, k]}")


def _row_chunks(n: int, k: int) -> list[slice]:
    rows = max(1, _CHUNK // (k * TILE_ROWS)) * TILE_ROWS
    return [slice(row, min(row + rows, n)) for row in range(0, n, rows)]


def _pick_blocks(dense: Packed, keep: torch.Tensor, format: SparseFormat) -> SparsePacked:
    codes = dense.codes.unflatten(1, (-1, format.bits))
    parts = {name: tensor for name, tensor in dense.tensors().items() if name != "codes"}
    return _picked(format, dense.n, dense.k, keep, codes=codes, **parts)


def _picked(format, n: int, k: int, keep: torch.Tensor, **tiled: torch.Tensor) -> SparsePacked:
    """Those of ``tiled [tiles, K/32, ...]`` of which anything is to be kept."""
    full = to_tiles(keep, format.padded_k(k))  # [tiles, K, 16]
    stored = full.unflatten(1, (-1, ACT_GROUP)).flatten(2).any(2)
    places = stored.nonzero()[:, 1].to(torch.int32)
    parts = {name: tensor[stored] for name, tensor in tiled.items()}
    return SparsePacked(format, n, k, **parts, starts=_ends(stored.sum(1)), places=places)


def _fours(rows: torch.Tensor, format: SparseFormat) -> torch.Tensor:
    """[n, k] -> [tiles, K/4, 16, 4]."""
    tiled = to_tiles(rows, format.padded_k(rows.shape[1]))
    return tiled.unflatten(1, (-1, LANE_K)).transpose(2, 3)


def _from_fours(fours: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The inverse of :func:`_fours`."""
    return from_tiles(fours.transpose(2, 3).flatten(1, 2), n)[:, :k]


def _zero(format: SparseFormat) -> int:
    """The code of zero."""
    return format.values.levels.index(0.0)


def _pick_pairs(dense: Packed, keep: torch.Tensor, format: SparseFormat) -> SparsePacked:
    q = _fours(formats.unpack(dense)[0], format)
    kept = _fours(keep, format)
    q = q.where(kept, q.new_tensor(_zero(format)))
    bits = (kept.to(torch.uint8) << torch.arange(LANE_K, device=q.device).to(torch.uint8)).sum(3)
    pairs = torch.tensor(_PLACES, dtype=torch.uint8, device=q.device)[bits]  # [tiles, K/4, 16]
    if bool((pairs == _TOO_MANY).any()):
        row, k = (pairs == _TOO_MANY).nonzero()[0][[0, 1]].tolist()
        raise ValueError(
            f"keep: more than two of 4 consecutive k of a row, from k = {LANE_K * k} on in one of "
            f"16 rows from {TILE_ROWS * row} on"
        )
    first, second = (q.gather(3, p.long()[..., None])[..., 0] for p in (pairs & 3, pairs >> 2))
    # Rows 0, 2, ... 14 and then 1, 3, ... 15, two in a byte.
    nibbles = pairs.unflatten(2, (8, 2)).transpose(2, 3).reshape(*pairs.shape[:2], 8, 2)
    places = nibbles[..., 0] | nibbles[..., 1] << 4
    codes = first | second << 4
    return SparsePacked(format, dense.n, dense.k, codes, dense.scales, places=places)


def _pick_bitmap(dense: Packed, keep: torch.Tensor, format: SparseFormat) -> SparsePacked:
    kept = _fours(keep, format).flatten(2)  # [tiles, K/4, 64], in the order of the bits
    q = _fours(formats.unpack(dense)[0], format).flatten(2)
    bits = kept.unflatten(2, (8, 8)).to(torch.uint8)
    places = (bits << torch.arange(8, device=q.device).to(torch.uint8)).sum(3).to(torch.uint8)
    counts = kept.sum(2)
    starts = _ends((counts + 1 >> 1).sum(1))
    nibbles = q.new_zeros(2 * (int(starts[-1]) + OVERRUN))
    nibbles[_nibbles(counts)] = q[kept]
    codes = nibbles[::2] | nibbles[1::2] << 4
    return SparsePacked(
        format, dense.n, dense.k, codes, dense.scales, starts=starts, places=places
    )


def _nibbles(counts: torch.Tensor) -> torch.Tensor:
    """Where among the nibbles of codes each code of so many in each 16 x 4 lies."""
    counts = counts.flatten()
    padding = torch.cumsum(counts & 1, 0) - (counts & 1)  # before each 16 x 4
    padding = padding.repeat_interleave(counts)
    return padding + torch.arange(len(padding), device=counts.device)


def to_dense(packed: SparsePacked) -> Packed:
    """The dense matrix of the same numbers: what is not stored has the code of zero, in blocks
    scale (and offset) 0.  Raises ValueError for float values, which have no such form."""
    format = packed.format
    if format.is_float:
        raise ValueError(f"packed: got {format}, whose values are not packed when dense")
    if format.pattern == "block":
        parts = packed.tensors()
        parts = {name: _spread(packed, parts[name]) for name in parts if name in _VALUES}
        parts["codes"] = parts["codes"].flatten(1, 2)
        return Packed(format.values, packed.n, packed.k, **parts)
    q, _ = _codes(packed)
    return formats.pack(q, from_tiles(packed.scales, packed.n), None, format.values)


_VALUES = ("codes", "scales", "offsets")  # of a block; starts and places say where it stands


def positions(packed: SparseTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Tile and place of each block: where it stands in ``[tiles, K/32, ...]``."""
    tiles = torch.arange(packed.tiles, device=packed.starts.device)
    return tiles.repeat_interleave(packed.starts.diff()), packed.places.long()


def _spread(packed: SparsePacked, blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, ...] -> [tiles, K/32, ...], zero where no block is."""
    columns = packed.format.padded_k(packed.k) // ACT_GROUP
    full = blocks.new_zeros(packed.tiles, columns, *blocks.shape[1:])
    full[positions(packed)] = blocks
    return full


def _codes(packed: SparsePacked) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and what is stored, ``[n, k]``, of 2:4 and unstructured."""
    sizes = (packed.n, packed.k)
    shape = (*packed.places.shape[:2], TILE_ROWS, LANE_K)
    q = packed.codes.new_full(shape, _zero(packed.format))
    kept = torch.zeros(shape, dtype=torch.bool, device=q.device)
    if packed.format.pattern == "2:4":
        nibbles = torch.stack((packed.places & 15, packed.places >> 4), dim=3)
        pairs = nibbles.flatten(2).unflatten(2, (2, 8)).transpose(2, 3).flatten(2)
        for shift in (0, 1):
            at = (pairs >> 2 * shift & 3).long()[..., None]
            q.scatter_(3, at, (packed.codes >> 4 * shift & 15)[..., None])
            kept.scatter_(3, at, True)
    else:
        bits = packed.places[..., None] >> torch.arange(8, device=q.device).to(torch.uint8) & 1
        kept = bits.flatten(2).bool()
        nibbles = torch.stack((packed.codes & 15, packed.codes >> 4), dim=1).flatten()
        q.flatten(2).masked_scatter_(kept, nibbles[_nibbles(kept.sum(2))])
        kept = kept.view(shape)
    return _from_fours(q, *sizes), _from_fours(kept, *sizes)


def unpack(packed: SparsePacked) -> tuple:
    """The inverse of :func:`pack`: ``q [n, k]``, ``keep [n, k]``, and ``scales [n, groups]`` and
    ``offsets``, or None.  What is not stored has the code of zero, in blocks code and scale 0."""
    if packed.format.pattern == "block":
        blocks = torch.ones(len(packed.places), ACT_GROUP, TILE_ROWS, dtype=torch.bool)
        keep = _rows_of_blocks(packed, blocks.to(packed.places.device))
        if packed.format.is_float:
            return _rows_of_blocks(packed, packed.codes), keep, None, None
        q, scales, offsets = formats.unpack(to_dense(packed))
        return q, keep, scales, offsets
    return *_codes(packed), from_tiles(packed.scales, packed.n), None


def _rows_of_blocks(packed: SparsePacked, blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, 32, 16] -> [n, k]."""
    return from_tiles(_spread(packed, blocks).flatten(1, 2), packed.n)[:, : packed.k].contiguous()


def dequantize(packed: SparsePacked, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``W [n, k]`` in ``dtype``, computed in float32 (float64 when that is asked for)."""
    if packed.format.pattern == "block":
        return _rows_of_blocks(packed, _floats(packed, dtype))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = formats.values(packed.format.values, compute, packed.codes.device)
    scales = from_tiles(packed.scales, packed.n)
    group = packed.format.values.group
    return formats.scaled(_codes(packed)[0], scales, None, group, values, compute).to(dtype)


def _floats(packed: SparsePacked, dtype: torch.dtype) -> torch.Tensor:
    """The values of blocks, [blocks, 32, 16]."""
    blocks = len(packed.places)
    if not blocks:
        return packed.codes.new_zeros(0, ACT_GROUP, TILE_ROWS, dtype=dtype)
    if packed.format.is_float:
        return packed.codes.to(dtype)
    # The tiles of a dense matrix of 32 k.
    scales, offsets = (None if t is None else t[:, None] for t in (packed.scales, packed.offsets))
    sizes = (blocks * TILE_ROWS, ACT_GROUP)
    rows = Packed(packed.format.values, *sizes, packed.codes, scales, offsets)
    return formats.dequantize(rows, dtype).view(blocks, TILE_ROWS, ACT_GROUP).transpose(1, 2)


def stack_rows(parts: Sequence[SparsePacked]) -> SparsePacked:
    """One matrix of the rows of all ``parts``, one below the other.  Of what is in them nothing is
    copied where it lies one behind the other in one storage.

    Raises ValueError for parts of different formats, ``k``, or types of scales.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(p.format.name, p.k, None if p.scales is None else p.scales.dtype) for p in parts}
    if len(kinds) != 1:
        raise ValueError(f"parts: got {sorted(map(str, kinds))}, expected one kind")
    n = sum(part.n for part in parts)
    if any(part.n % TILE_ROWS for part in parts[:-1]):  # tiles would hold padding inside
        columns = zip(*(unpack(part) for part in parts))
        return pack(*(None if c[0] is None else torch.cat(c) for c in columns), first.format)
    each = {name: [part.tensors()[name] for part in parts] for name in first.tensors()}
    starts = {}
    if "starts" in each:
        starts["starts"] = _ends(torch.cat([starts.diff() for starts in each.pop("starts")]))
    if first.format.pattern == "unstructured":
        *others, last = each["codes"]
        each["codes"] = [*(codes[:-OVERRUN] for codes in others), last]
    for name, tensors in each.items():  # an empty view tells of no place in memory
        each[name] = joined([tensor for tensor in tensors if len(tensor)] or tensors[:1])
    return SparsePacked(first.format, n, first.k, **each, **starts)


def split_rows(packed: SparsePacked, sizes: Sequence[int]) -> list[SparsePacked]:
    """The inverse of :func:`stack_rows`; views, but for starts, where every size but the last is a
    multiple of 16.

    Raises ValueError for sizes that do not add up to ``n``.
    """
    if sum(sizes) != packed.n:
        raise ValueError(f"sizes: got {list(sizes)}, the matrix has {packed.n} rows")
    if len(sizes) == 1:
        return [packed]
    if any(size % TILE_ROWS for size in sizes[:-1]):
        columns = (None if t is None else t.split(list(sizes)) for t in unpack(packed))
        columns = [[None] * len(sizes) if c is None else c for c in columns]
        return [pack(*parts, packed.format) for parts in zip(*columns)]
    return list(_split_tiles(packed, sizes))


def _split_tiles(packed: SparsePacked, sizes: Sequence[int]) -> Iterator[SparsePacked]:
    begin = 0
    for size in sizes:
        end = begin + -(-size // TILE_ROWS)
        parts = packed.tensors()
        if packed.starts is None:
            parts = {name: tensor[begin:end] for name, tensor in parts.items()}
        else:
            starts = packed.starts[begin : end + 1]
            low, high = int(starts[0]), int(starts[-1])
            if packed.format.pattern == "block":
                parts = {name: tensor[low:high] for name, tensor in parts.items()}
            else:
                parts = {name: tensor[begin:end] for name, tensor in parts.items()}
                parts["codes"] = packed.codes[low : high + OVERRUN]
            parts["starts"] = starts - low
        yield SparsePacked(packed.format, size, packed.k, **parts)
        begin = end
