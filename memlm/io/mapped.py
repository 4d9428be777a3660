"""Safetensors files as numpy arrays, memory-mapped: for where there is no torch.  (The safetensors
package's own numpy reader copies.)"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from memlm.errors import FormatError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_mapped(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, read-only where the file is mapped.

    Raises FileNotFoundError, FormatError for a file that is truncated or malformed, ImportError for
    bfloat16 tensors where the package ml_dtypes is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(file[:8].tobytes(), "little")
        header = json.loads(file[8:start].tobytes())
        header.pop("__metadata__", None)
        return {name: _tensor(name, entry, file[start:]) for name, entry in header.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error!r}") from None


def _tensor(name: str, entry: dict, data: np.ndarray) -> np.ndarray:
    dtype, shape = _dtype(name, entry["dtype"]), entry["shape"]
    begin, end = entry["data_offsets"]
    sizes = (*shape, begin, end - begin)
    if not all(type(size) is int and size >= 0 for size in sizes) or end > len(data):
        raise ValueError(f"{name}: shape {shape} at {begin}..{end} of {len(data)} bytes")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - begin} bytes for {dtype} {shape}")
    return data[begin:end].view(np.ndarray).view(dtype).reshape(shape)


def _dtype(name: str, code: str) -> np.dtype:
    if code != "BF16":
        return np.dtype(_DTYPES[code])
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ImportError(f"{name}: bfloat16 in numpy needs the package ml_dtypes") from None
    return np.dtype(bfloat16)
