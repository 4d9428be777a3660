"""Safetensors files as numpy arrays, memory-mapped: for where there is no torch.  (The safetensors
package's own numpy reader copies.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memlm.errors import FormatError
from memlm.io._header import read_header

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
    entries, _ = read_header(path)
    file = np.memmap(path, np.uint8, "r").view(np.ndarray)
    return {
        name: file[entry.start : entry.end].view(_dtype(path, name, entry.dtype)).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _dtype(path: Path, name: str, code: str) -> np.dtype:
    if code in _DTYPES:
        return np.dtype(_DTYPES[code])
    if code != "BF16":
        raise FormatError(f"{path}: {name:.80}: numpy has no {code}")
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ImportError(f"{name}: bfloat16 in numpy needs the package ml_dtypes") from None
    return np.dtype(bfloat16)
