"""The packed weight formats: the specification, executable.

A weight matrix ``W[n, k]`` is cut along ``k`` into groups.  Each row of each group has one scale
``s`` (and, when asymmetric, one offset ``o``); each weight has one integer code ``q``::

    int8     symmetric    w = s * q           q in -128..127   (the quantiser uses -127..127)
    int4     symmetric    w = s * (q - 8)     q in 0..15
    int4     asymmetric   w = s * q + o       q in 0..15
    nf4      symmetric    w = s * levels[q]   q in 0..15, NF4_LEVELS
    int2     symmetric    w = s * (q - 1)     q in 0..3
    int2     asymmetric   w = s * q + o       q in 0..3
    ternary  symmetric    w = s * (q - 1)     q in 0..2: int2 without its fourth level

A name says it all: ``int8-row`` (one scale per row), ``int8-g32``, ``int4-g128``, ``int4a-g64``
(``a``: asymmetric), ``nf4-g64``, ``ternary-g128``.  ``int8``, ``int4``, ``nf4``, ``int2`` and
``ternary`` alone mean ``DEFAULTS``.

Layout, version 1
-----------------
Rows go in *tiles* of 16.  Inside a tile, 4 consecutive ``k`` of one row stand side by side, then
come the other 15 rows: a *block* of 64 bytes.  It is what one 512-bit register holds, or two
256-bit, or four 128-bit ones, each 32-bit lane being one row: the four products of a lane are what
``vpmaddubsw+vpmaddwd``, ``vpdpbusd`` and ``sdot`` add up, so no sum across lanes is ever needed.

::

    codes, 8 bits: int8 [tiles, K/4, 16, 4]         codes, 4 bits: uint8 [tiles, K/8, 16, 4]

    one block:         byte 0   1   2   3           one block:         byte 0    1    2    3
      row 0   (lane 0)  k+0 k+1 k+2 k+3               row 0   low  nibble k+0  k+1  k+2  k+3
      row 1   (lane 1)  k+0 k+1 k+2 k+3                       high nibble k+4  k+5  k+6  k+7
      ...                                             row 1   ...
      row 15  (lane 15) k+0 k+1 k+2 k+3               row 15  ...

    codes, 2 bits: uint8 [tiles, K/16, 16, 4]: as 4 bits, with k+0, k+4, k+8, k+12 in the first byte
    from its lowest bits up, k+1, k+5, k+9, k+13 in the second, and so on

    scales:  f16 or f32 [tiles, groups, 16]         scales[t, g, r] is row 16t+r, group g
    offsets: like scales (asymmetric only)

``K`` is ``k`` rounded up to a multiple of 32 and of the group; ``tiles = ceil(n / 16)``.  What is
added has code 0 and scale 0; the kernels read activations beyond ``k`` as zero and write no row
beyond ``n``, so padding never reaches a result.

The integer kernels quantise activations in groups of 32 along ``k``, hence the 32.  Codes and
scales are separate tensors: each is read front to back, and other tools see plain arrays.
``csrc/formats.h`` holds the same constants for C++; a test compares the two.

Matrices with many zeros are stored as :mod:`memlm.sparse_formats` draws, with the codes of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memlm._format import (
    ACT_GROUP, CODEBOOKS, DEFAULTS, GROUPS, LANE_K, NF4_LEVELS, TILE_ROWS, VERSION, ZEROS, Format,
)  # fmt: skip
from memlm.errors import FormatError

__all__ = [
    "ACT_GROUP", "CODEBOOKS", "DEFAULTS", "GROUPS", "LANE_K", "NF4_LEVELS", "SCALE_DTYPES",
    "TILE_ROWS", "VERSION", "ZEROS", "Format", "Packed", "check", "dequantize", "from_tiles", "joined",
    "layout", "pack", "scaled", "split_rows", "stack_rows", "to_tiles", "unpack", "values",
]  # fmt: skip

SCALE_DTYPES = (torch.float16, torch.float32)


@dataclass
class Packed:
    """A quantised matrix ``W[n, k]`` in the layout that this module draws.

    ``codes``, ``scales`` and ``offsets`` are as :func:`layout` says; checked when made
    (FormatError), so that whoever holds a ``Packed`` may hand its memory to a kernel.
    """

    format: Format
    n: int
    k: int
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None

    def __post_init__(self):
        check(self.format, self.n, self.k, self.tensors())

    def tensors(self) -> dict[str, torch.Tensor]:
        parts = {"codes": self.codes, "scales": self.scales, "offsets": self.offsets}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def layout(
    format: Format, n: int, k: int, scale_dtype: torch.dtype = torch.float16
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors of a packed ``W[n, k]``."""
    if n < 1 or k < 1:
        raise ValueError(f"shape: got n={n}, k={k}, both must be at least 1")
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype: got {scale_dtype}, accepted are {SCALE_DTYPES}")
    tiles = -(-n // TILE_ROWS)
    per_byte = 8 // format.bits
    blocks = format.padded_k(k) // (LANE_K * per_byte)
    code_dtype = torch.int8 if format.bits == 8 else torch.uint8
    scales = ((tiles, format.groups(k), TILE_ROWS), scale_dtype)
    parts = {"codes": ((tiles, blocks, TILE_ROWS, LANE_K), code_dtype), "scales": scales}
    if not format.symmetric:
        parts["offsets"] = scales
    return parts


def check(format: Format, n: int, k: int, tensors: dict[str, torch.Tensor]) -> None:
    """Raises FormatError unless ``tensors`` are what :func:`layout` says for ``W[n, k]``."""
    scales = tensors.get("scales")
    if not isinstance(scales, torch.Tensor) or scales.dtype not in SCALE_DTYPES:
        got = scales.dtype if isinstance(scales, torch.Tensor) else type(scales).__name__
        raise FormatError(f"scales: got {got}, accepted are tensors of {SCALE_DTYPES}")
    wanted = layout(format, n, k, scales.dtype)
    check_tensors(format, n, k, tensors, wanted)


def check_tensors(format, n: int, k: int, tensors: dict[str, torch.Tensor], wanted: dict) -> None:
    """Raises FormatError unless ``tensors`` are contiguous and as ``wanted``, a layout of the format
    for ``W[n, k]``, says."""
    if set(wanted) != set(tensors):
        raise FormatError(f"{format}: got tensors {sorted(tensors)}, expected {sorted(wanted)}")
    for name, (shape, dtype) in wanted.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise FormatError(
                f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
                f" for {format} of a {n}x{k} matrix"
            )
        if not tensor.is_contiguous():
            raise FormatError(f"{name}: must be contiguous")


def to_tiles(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """[n, c] -> [tiles, columns, 16], padded with zeros."""
    n, c = rows.shape
    tiles = -(-n // TILE_ROWS)
    full = rows.new_zeros(tiles * TILE_ROWS, columns)
    full[:n, :c] = rows
    return full.view(tiles, TILE_ROWS, columns).transpose(1, 2).contiguous()


def from_tiles(tiled: torch.Tensor, n: int) -> torch.Tensor:
    """[tiles, columns, 16] -> [n, columns]."""
    tiles, columns, _ = tiled.shape
    return tiled.transpose(1, 2).reshape(tiles * TILE_ROWS, columns)[:n]


def pack(
    q: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, format: str | Format
) -> Packed:
    """Codes ``q [n, k]`` (uint8 in ``format.codes``, or int8), scales and offsets ``[n, groups]`` (f16 or f32)
    -> :class:`Packed`.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    format = Format.parse(format)
    code_dtype = torch.int8 if format.bits == 8 else torch.uint8
    if q.dim() != 2 or q.numel() == 0:
        raise ValueError(f"q: got shape {list(q.shape)}, expected [n, k] with n, k at least 1")
    if q.dtype != code_dtype:
        raise TypeError(f"q: got {q.dtype}, expected {code_dtype} for {format}")
    if format.bits < 8 and int(q.max()) not in format.codes:
        raise ValueError(
            f"q: got codes up to {int(q.max())}, those of {format} are 0..{format.codes[-1]}"
        )
    if (offsets is None) != format.symmetric:
        raise ValueError(
            f"offsets: got {'none' if offsets is None else 'a tensor'}, {format} has "
            f"{'none' if format.symmetric else 'one for each scale'}"
        )
    n, k = q.shape
    groups = format.groups(k)
    for name, t in (("scales", scales), ("offsets", offsets)):
        if t is None:
            continue
        if t.dtype not in SCALE_DTYPES:
            raise TypeError(f"{name}: got {t.dtype}, accepted are {SCALE_DTYPES}")
        if tuple(t.shape) != (n, groups):
            raise ValueError(f"{name}: got shape {list(t.shape)}, expected {[n, groups]}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{name}: contains NaN or Inf")
    if offsets is not None and offsets.dtype != scales.dtype:
        raise TypeError(f"offsets: got {offsets.dtype}, expected that of scales, {scales.dtype}")

    padded = format.padded_k(k)
    tiles = -(-n // TILE_ROWS)
    codes = to_tiles(q, padded)  # [tiles, K, 16]
    fields = codes.view(tiles, -1, 8 // format.bits, LANE_K, TILE_ROWS)
    codes = fields[:, :, 0]
    for i in range(1, fields.shape[2]):
        codes = codes | fields[:, :, i] << i * format.bits
    codes = codes.transpose(2, 3)
    return Packed(
        format,
        n,
        k,
        codes.contiguous(),
        to_tiles(scales, groups),
        None if offsets is None else to_tiles(offsets, groups),
    )


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inverse of :func:`pack`: ``q [n, k]``, ``scales [n, groups]``, ``offsets`` or None."""
    codes = packed.codes.transpose(2, 3)  # [tiles, blocks, 4, 16]
    bits = packed.format.bits
    if bits < 8:
        fields = [codes >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        codes = torch.stack(fields, dim=2)
    tiles = codes.shape[0]
    q = from_tiles(codes.reshape(tiles, -1, TILE_ROWS), packed.n)[:, : packed.k]
    offsets = None if packed.offsets is None else from_tiles(packed.offsets, packed.n)
    return q.contiguous(), from_tiles(packed.scales, packed.n), offsets


def stack_rows(parts: Sequence[Packed]) -> Packed:
    """One matrix of the rows of all ``parts``, one below the other.  Nothing is copied where their
    tensors lie one behind the other in one storage, as those of a packed model do.

    Raises ValueError for parts of different formats, ``k``, or types of scales.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(p.format.name, p.k, p.scales.dtype) for p in parts}
    if len(kinds) != 1:
        raise ValueError(f"parts: got {sorted(map(str, kinds))}, expected one kind")
    n = sum(part.n for part in parts)
    if any(part.n % TILE_ROWS for part in parts[:-1]):  # tiles would hold padding inside
        columns = zip(*(unpack(part) for part in parts))
        q, scales, offsets = (None if c[0] is None else torch.cat(c) for c in columns)
        return pack(q, scales, offsets, first.format)
    whole = {name: joined([part.tensors()[name] for part in parts]) for name in first.tensors()}
    return Packed(first.format, n, first.k, **whole)


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Along the first dimension: a view where they are neighbours in memory."""
    first, ends = tensors[0], [t.data_ptr() + t.nbytes for t in tensors]
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    if len(storages) == 1 and ends[:-1] == [t.data_ptr() for t in tensors[1:]]:
        shape = (sum(len(t) for t in tensors), *first.shape[1:])
        return first.as_strided(shape, first.stride())
    return torch.cat(tensors)


def split_rows(packed: Packed, sizes: Sequence[int]) -> list[Packed]:
    """The inverse of :func:`stack_rows`; views where every size but the last is a multiple of 16.

    Raises ValueError for sizes that do not add up to ``n``.
    """
    if sum(sizes) != packed.n:
        raise ValueError(f"sizes: got {list(sizes)}, the matrix has {packed.n} rows")
    if len(sizes) == 1:
        return [packed]
    if any(size % TILE_ROWS for size in sizes[:-1]):
        q, scales, offsets = (None if t is None else t.split(list(sizes)) for t in unpack(packed))
        return [
            pack(q[i], scales[i], None if offsets is None else offsets[i], packed.format)
            for i in range(len(sizes))
        ]
    tiles = [-(-size // TILE_ROWS) for size in sizes]
    parts = {name: tensor.split(tiles) for name, tensor in packed.tensors().items()}
    return [
        Packed(packed.format, size, packed.k, **{name: t[i] for name, t in parts.items()})
        for i, size in enumerate(sizes)
    ]


def values(format: Format, dtype: torch.dtype = torch.float32, device=None) -> torch.Tensor:
    """``format.levels`` as a tensor."""
    return torch.tensor(format.levels, device=device).to(dtype)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``W [n, k]`` in ``dtype``, computed in float32 (float64 when that is asked for)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    levels = None
    if packed.format.bits < 8:
        levels = values(packed.format, compute, packed.codes.device)
    return dequantize_with(packed, levels, compute).to(dtype)


def dequantize_with(packed: Packed, values: torch.Tensor | None, compute: torch.dtype):
    """As :func:`dequantize`, with ``values`` for the codes 0, 1, ...; None: themselves."""
    return scaled(*unpack(packed), packed.format.group, values, compute)


def scaled(q, scales, offsets, group: int, values: torch.Tensor | None, compute: torch.dtype):
    """The weights ``[n, k]`` of codes, scales and offsets as :func:`unpack` returns them."""
    k = q.shape[1]
    span = group or k
    q = q.to(compute) if values is None else values[q.int()]
    w = q * scales.to(compute).repeat_interleave(span, dim=1)[:, :k]
    if offsets is not None:
        w += offsets.to(compute).repeat_interleave(span, dim=1)[:, :k]
    return w
