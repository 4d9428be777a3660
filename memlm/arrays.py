"""The kernels over arrays, without torch: this module never imports it.

An array is a numpy array, or whatever has ``__dlpack__`` and lies on the CPU: JAX arrays, torch
tensors, and so on.  All are used where they lie; nothing is copied, so what the kernels cannot
read in place is refused: rows must be contiguous, in aligned memory, at one distance from each
other (a slice of columns is fine, a transpose or every second column is not).

Results are new numpy arrays of x's dtype, aligned so that ``jax.numpy.from_dlpack`` takes them
without a copy.  For bfloat16, which numpy lacks, that is ml_dtypes' (ImportError where that package,
which comes with JAX, is missing).  Or the result goes to ``out``: any writable array that overlaps
none of the inputs, of the result's dtype and shape.  Writable are numpy arrays, unless marked
read-only, and those that say so, as DLPack does from version 1.0 on: torch tensors are, JAX arrays
are not.

Functions may be called from several Python threads at once: the GIL is released while they
compute.  ``threads`` is how many threads compute one call, None all that this process may use; the
result does not depend on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from memlm import _core, _rounding
from memlm._format import (
    DEFAULT_MODES, FILE_PARTS, FOLDER_VERSION, LANE_K, TILE_ROWS, Format, SparseFormat,
    parse_format,
)  # fmt: skip
from memlm.errors import FormatError
from memlm.io.files import read_json
from memlm.io.mapped import open_mapped

__all__ = [
    "Format", "FormatError", "Packed", "SparseFormat", "SparsePacked", "block_sparse_matmul",
    "dequantize", "embedding", "load", "matmul", "pack", "quantize", "quantize_rows", "w2_matmul",
    "w4_matmul", "w4_sparse_matmul", "w8_matmul", "w8a8_matmul",
]  # fmt: skip

PARTS = ("codes", "scales", "offsets")
SPARSE_PARTS = (*PARTS, "starts", "places")
Array = Any  # numpy's, or one with __dlpack__

_THREADS = len(os.sched_getaffinity(0))


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantised matrix ``W[n, k]`` in the layout that ``memlm/formats.py`` draws: ``codes``,
    ``scales`` and ``offsets`` are arrays of any kind, checked when made (FormatError).

    The functions below also take a :class:`memlm.Packed`, of torch tensors.
    """

    format: Format
    n: int
    k: int
    codes: Array
    scales: Array
    offsets: Array | None = None

    def __post_init__(self):
        if (self.offsets is None) != self.format.symmetric:
            raise FormatError(
                f"offsets: got {'none' if self.offsets is None else 'an array'}, {self.format} has "
                f"{'none' if self.format.symmetric else 'one for each scale'}"
            )
        _check(self)


@dataclass(frozen=True, eq=False)
class SparsePacked:
    """A sparse matrix ``W[n, k]`` in the layout that ``memlm/sparse_formats.py`` draws, of arrays
    of any kind, checked when made (FormatError): all that its starts and places say, too.

    ``matmul`` and the sparse matmuls also take a :class:`memlm.SparsePacked`, of torch tensors.
    """

    format: SparseFormat
    n: int
    k: int
    codes: Array
    scales: Array | None = None
    offsets: Array | None = None
    starts: Array | None = None
    places: Array | None = None

    def __post_init__(self):
        lacks = self.scales is not None and self.format.symmetric is not (self.offsets is None)
        if lacks or self.format.is_float is not (self.scales is None):
            raise FormatError(f"scales, offsets: are not those of {self.format}")
        if self.format.pattern == "2:4" and self.starts is not None:
            raise FormatError(f"starts: got an array, {self.format} has none")
        _check(self)


def _check(packed: Packed | SparsePacked) -> None:
    """Raises FormatError unless the arrays are such a matrix."""
    p = packed
    if not isinstance(p.n, int) or not isinstance(p.k, int):
        raise FormatError(f"n, k: got {p.n!r}, {p.k!r}, accepted are integers")
    try:
        _core.check_packed(_parts(p))
    except (TypeError, ValueError) as error:
        raise FormatError(f"{error} (for {p.format} of a {p.n}x{p.k} matrix)") from None


def _parts(packed: Packed | SparsePacked) -> tuple:
    """What the kernels take of a packed matrix."""
    p = packed
    try:
        parts = p.format, p.n, p.k, p.codes, p.scales, p.offsets
        return (*parts, p.starts, p.places) if hasattr(p.format, "pattern") else parts
    except AttributeError:
        raise TypeError(f"packed: got {type(packed).__name__}, accepted is a Packed") from None


def w4_matmul(
    x: Array,
    packed: Packed,
    bias: Array | None = None,
    mode: str = "fast",
    norm: Array | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Array | None = None,
    *,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """``x W^T + bias`` for ``x [..., k]`` (f32, f16, bf16) and a packed 4-bit ``W [n, k]``:
    ``[..., n]`` in x's dtype, ``[..., n / 2]`` with ``swiglu``.  ``bias [n]``, ``norm [k]`` and
    ``residual``, shaped as the result, have that dtype too.

    :func:`memlm.ops.w4_matmul` says what is computed, to the last bit; ``mode`` is ``"fast"`` or
    ``"accurate"``.  ``out`` may be ``residual`` itself, which is then updated in place.

    Raises TypeError or ValueError naming the argument that does not fit, before anything is read
    or written, and BufferError for an array that its library does not share.
    """
    around = _around(bias, norm, eps, swiglu, residual, out, threads)
    return _core.w4_matmul(x, _parts(packed), _is_fast(mode), around)


def w2_matmul(
    x: Array,
    packed: Packed,
    bias: Array | None = None,
    mode: str = "fast",
    norm: Array | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Array | None = None,
    *,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The same for a packed 2-bit W: see :func:`w4_matmul`."""
    around = _around(bias, norm, eps, swiglu, residual, out, threads)
    return _core.w2_matmul(x, _parts(packed), _is_fast(mode), around)


def w8_matmul(
    x: Array,
    packed: Packed,
    bias: Array | None = None,
    mode: str = "accurate",
    norm: Array | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Array | None = None,
    *,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The same for a packed 8-bit W: see :func:`w4_matmul`."""
    around = _around(bias, norm, eps, swiglu, residual, out, threads)
    return _core.w8_matmul(x, _parts(packed), _is_fast(mode), around)


def w8a8_matmul(
    x: Array,
    x_scales: Array | None,
    packed: Packed,
    bias: Array | None = None,
    x_group: int = 0,
    norm: Array | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Array | None = None,
    dtype=None,
    *,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """``x W^T + bias`` for int8 x and a packed 8-bit ``W [n, k]``: x is given in int8 with
    ``x_scales``, as by :func:`quantize_rows`, or in f32, f16 or bf16 and rounded on the way
    (``x_scales`` None).  :func:`memlm.ops.w8a8_matmul` says what is computed; ``dtype``, of a
    result of int8 x, is float32 unless given.  All else is as for :func:`w4_matmul`.
    """
    around = _around(bias, norm, eps, swiglu, residual, out, threads)
    name = "" if dtype is None else _dtype_name(dtype)
    return _core.w8a8_matmul(x, x_scales, _parts(packed), x_group, name, around)


def block_sparse_matmul(
    x: Array,
    packed: SparsePacked,
    bias: Array | None = None,
    mode: str | None = None,
    norm: Array | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Array | None = None,
    *,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The same for a W of blocks; ``mode`` None is that of the dense operation, and blocks of
    floats are multiplied in f32 in either: see :func:`w4_matmul` and
    :func:`memlm.ops.block_sparse_matmul`."""
    around = _around(bias, norm, eps, swiglu, residual, out, threads)
    parts = _parts(packed)
    fast = _is_fast(mode or DEFAULT_MODES[parts[0].bits])
    return _core.block_sparse_matmul(x, parts, fast, around)


def w4_sparse_matmul(
    x: Array,
    packed: SparsePacked,
    bias: Array | None = None,
    mode: str = "fast",
    norm: Array | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: Array | None = None,
    *,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """The same for a W of which two of every 4, or any, are stored: see :func:`w4_matmul`,
    :func:`memlm.ops.w4_sparse_matmul`."""
    around = _around(bias, norm, eps, swiglu, residual, out, threads)
    return _core.w4_sparse_matmul(x, _parts(packed), _is_fast(mode), around)


def matmul(
    x: Array,
    packed: Packed | SparsePacked,
    bias: Array | None = None,
    mode: str | None = None,
    **options,
):
    """The product by the operation that fits ``packed.format`` and ``mode``: ``"fast"``,
    ``"accurate"``, for 8 bits, dense, ``"w8a8"`` (one scale per row of x), or None for the
    operation's default.  All other arguments are those of :func:`w4_matmul`."""
    format = _parts(packed)[0]
    modes = {} if mode is None else {"mode": mode}
    if hasattr(format, "pattern"):
        product = block_sparse_matmul if format.pattern == "block" else w4_sparse_matmul
        return product(x, packed, bias, **modes, **options)
    if mode == "w8a8" and format.bits == 8:
        return w8a8_matmul(x, None, packed, bias, **options)
    return _MATMULS[format.bits](x, packed, bias, **modes, **options)


_MATMULS = {2: w2_matmul, 4: w4_matmul, 8: w8_matmul}  # by bits per weight


def _is_fast(mode: str) -> bool:
    if mode not in ("fast", "accurate"):
        raise ValueError(f"mode: got {mode!r}, accepted are 'fast', 'accurate', for 8 bits 'w8a8'")
    return mode == "fast"


def _around(bias, norm, eps, swiglu, residual, out, threads) -> tuple:
    """What the kernels take beside x and W."""
    return bias, norm, _number("eps", eps), bool(swiglu), residual, out, _threads(threads)


def _number(name: str, value) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    return float(value)


def _threads(threads: int | None) -> int:
    if threads is None:
        return _THREADS
    if not isinstance(threads, Integral):
        raise TypeError(f"threads: got {type(threads).__name__}, expected an integer or None")
    return int(threads)


def quantize_rows(
    x: Array,
    x_group: int = 0,
    norm: Array | None = None,
    eps: float = 0.0,
    *,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """``x [..., k]`` (f32, f16, bf16) -> int8 codes ``[..., k]`` and f32 scales ``[..., 1]``,
    or with ``x_group=32`` one for each 32 k: rounded once for several :func:`w8a8_matmul`.
    :func:`memlm.ops.quantize_rows` says how."""
    return _core.quantize_rows(x, x_group, norm, _number("eps", eps), _threads(threads))


def embedding(
    ids: Array,
    packed: Packed,
    dtype="float32",
    *,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """``W[ids]`` for ``ids [...]`` (int64, int32) in 0..n-1 and a packed ``W [n, k]``: ``[..., k]``
    in ``dtype`` (float32, float16, bfloat16: a name or a numpy dtype).  Only the rows asked for are
    dequantised.

    Raises TypeError or ValueError naming the argument that does not fit, before anything is
    written.
    """
    return _core.embedding(ids, _parts(packed), _dtype_name(dtype), out, _threads(threads))


def dequantize(
    packed: Packed, dtype="float32", *, out: Array | None = None, threads: int | None = None
) -> Array:
    """``W [n, k]`` of a packed matrix in ``dtype``, as for :func:`embedding`, computed in f32."""
    return _core.dequantize(_parts(packed), _dtype_name(dtype), out, _threads(threads))


def _dtype_name(dtype) -> str:
    try:
        return dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        raise TypeError(f"dtype: got {dtype!r}, accepted are names and numpy dtypes") from None


def quantize(w: Array, format: str | Format, *, threads: int | None = None) -> Packed:
    """Quantise ``w [n, k]``, of floats of any size, and pack it: to the same codes and scales, bit
    for bit, as :func:`memlm.quantize_weight`, which says how.  ``w`` is whatever ``numpy.asarray``
    takes; of float32, float16 or bfloat16 with contiguous rows it is used where it lies.

    Raises TypeError for a weight that is not floating point, ValueError for one that is not a
    matrix, is empty, or holds NaN or Inf.
    """
    format, w = Format.parse(format), np.asarray(w)
    if not _is_float(w.dtype):
        raise TypeError(f"w: got {w.dtype}, accepted is a floating-point array")
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"w: got shape {list(w.shape)}, expected [n, k] with n, k at least 1")
    if w.dtype.name not in ("float32", "float16", "bfloat16") or not w.dtype.isnative:
        with np.errstate(over="ignore"):  # to Inf, which is refused
            w = w.astype(np.float32)
    if not _rows_are_apart(w):
        w = np.ascontiguousarray(w)
    threads = _threads(threads)
    scale_dtype = _rounding.scale_dtype(np, format, _core.largest_magnitude(w, threads))
    parts = _core.quantize_weight(w, format, np.dtype(scale_dtype).name, threads)
    return Packed(format, *w.shape, *parts)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _rows_are_apart(w: np.ndarray) -> bool:
    """Whether the kernels can read ``w [n, k]`` where it lies."""
    aligned = w.flags.aligned and w.strides[0] % w.itemsize == 0
    return aligned and w.strides[1] == w.itemsize and w.strides[0] >= w.shape[1] * w.itemsize


def pack(q: Array, scales: Array, offsets: Array | None, format: str | Format) -> Packed:
    """Codes ``q [n, k]`` (uint8 0..15, or int8), scales and offsets ``[n, groups]`` (f16 or f32) ->
    :class:`Packed`: :func:`memlm.formats.pack` for whatever ``numpy.asarray`` takes.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    format = Format.parse(format)
    q, scales = np.asarray(q), np.asarray(scales)
    offsets = None if offsets is None else np.asarray(offsets)
    code_dtype = np.dtype(np.int8 if format.bits == 8 else np.uint8)
    if q.ndim != 2 or q.size == 0:
        raise ValueError(f"q: got shape {list(q.shape)}, expected [n, k] with n, k at least 1")
    if q.dtype != code_dtype:
        raise TypeError(f"q: got {q.dtype}, expected {code_dtype} for {format}")
    if q.max() not in format.codes:
        raise ValueError(f"q: got codes up to {q.max()}, those of {format} are {format.codes}")
    n, k = q.shape
    groups = format.groups(k)
    for name, array in (("scales", scales), ("offsets", offsets)):
        if array is None:
            continue
        if array.dtype not in (np.float16, np.float32):
            raise TypeError(f"{name}: got {array.dtype}, accepted are float16, float32")
        if array.shape != (n, groups):
            raise ValueError(f"{name}: got shape {list(array.shape)}, expected {[n, groups]}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: contains NaN or Inf")
    # A byte holds the codes of `parts` runs of LANE_K k, the first in its lowest bits.
    parts = 8 // format.bits
    codes = _to_tiles(q, format.padded_k(k)).view(np.uint8)
    codes = codes.reshape(len(codes), -1, parts, LANE_K, TILE_ROWS).swapaxes(3, 4)
    packed = codes[:, :, 0].copy()
    for part in range(1, parts):
        packed |= codes[:, :, part] << format.bits * part
    return Packed(
        format,
        n,
        k,
        packed.view(code_dtype),
        _to_tiles(scales, groups),
        None if offsets is None else _to_tiles(offsets, groups),
    )


def _to_tiles(rows: np.ndarray, columns: int) -> np.ndarray:
    """[n, c] -> [tiles, columns, 16], padded with zeros."""
    n, c = rows.shape
    tiles = -(-n // TILE_ROWS)
    full = np.zeros((tiles * TILE_ROWS, columns), rows.dtype)
    full[:n, :c] = rows
    return np.ascontiguousarray(full.reshape(tiles, TILE_ROWS, columns).swapaxes(1, 2))


def load(folder: str | Path) -> dict[str, Packed | SparsePacked | np.ndarray]:
    """What a packed memlm folder (memlm/io/packed_folder.py) holds, memory-mapped: nothing is copied,
    and nothing read until it is used, but for the places of sparse matrices.  Packed matrices stand
    under their module's name, all other tensors, read-only, under their own; the ``order`` of a
    matrix whose columns have one under ``<module>.order``.

    Raises FileNotFoundError; FormatError for files that are malformed or hold no packed model;
    ImportError for bfloat16 tensors where the package ml_dtypes is missing.
    """
    folder = Path(folder)
    config = folder / "config.json"
    quantization = read_json(config).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "memlm":
        raise FormatError(f"{config}: holds no packed memlm model")
    if (version := quantization.get("version")) != FOLDER_VERSION:
        raise FormatError(f"{config}: version {version!r}; known is {FOLDER_VERSION}")
    tensors = open_mapped(folder / "model.safetensors")
    packed, used = {}, set()
    try:
        for name, spec in quantization["layers"].items():
            owner = spec.get("tied_to", name)
            format = parse_format(spec["format"])
            sparse = isinstance(format, SparseFormat)
            kind, expected = (SparsePacked, SPARSE_PARTS) if sparse else (Packed, PARTS)
            names = {part: f"{owner}.{FILE_PARTS[part]}" for part in expected}
            parts = {part: tensors.get(file) for part, file in names.items()}
            packed[name] = kind(format, spec["n"], spec["k"], **parts)
            used |= set(names.values())
    except FormatError as error:
        raise FormatError(f"{folder}: {name}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{config}: layers are malformed: {error!r}") from None
    return packed | {name: tensor for name, tensor in tensors.items() if name not in used}
