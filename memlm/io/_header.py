"""The header of a safetensors file (https://huggingface.co/docs/safetensors), without torch.

    8 bytes: length of the header, little-endian | the header, JSON | the tensors' bytes

Everything in it may be a lie: it is checked against the file before any of it is used.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from memlm.errors import FormatError

METADATA = "__metadata__"
MAX_BYTES = 100_000_000  # of a header; the safetensors library reads no longer one
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor; ``start`` and ``end`` in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """All tensors, in the order of their bytes, and the metadata.

    Raises FileNotFoundError; FormatError for a file that is truncated or malformed: the tensors'
    bytes must fill the file, without holes and without overlap.
    """

    def error(what: str) -> FormatError:
        return FormatError(f"{path}: not a valid safetensors file: {what}")

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_BYTES, size - 8):
            raise error(f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as problem:
        raise error(f"the header is no JSON: {problem}") from None
    metadata = header.pop(METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise error("the header is no object of tensors and of metadata, strings")

    entries = {}
    for name, value in header.items():
        problem, entry = _entry(value, 8 + length)
        if problem:
            raise error(f"{name:.80}: {problem}")
        entries[name] = entry
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    end = 8 + length
    for name, entry in entries.items():
        if entry.start != end:
            raise error(f"{name:.80}: starts at byte {entry.start}, the one before ends at {end}")
        end = entry.end
    if end != size:
        raise error(f"the tensors end at byte {end}, the file at {size}")
    return entries, metadata


def _unique(pairs: list) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _entry(value, data: int) -> tuple[str | None, Entry | None]:
    """What is wrong with a header's value, or the tensor it describes."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets", None
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"dtype {dtype!r:.40}; known are {', '.join(ITEM_BYTES)}", None
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 2**63 for n in numbers
        ):
            return f"{numbers!r:.80} is no list of sizes", None
    if len(offsets) != 2 or len(shape) > 64:
        return f"{len(offsets)} data_offsets, {len(shape)} dimensions", None
    wanted = math.prod(shape) * ITEM_BYTES[dtype]  # Python integers: no overflow
    if offsets[1] - offsets[0] != wanted:
        return f"bytes {offsets[0]} to {offsets[1]} for {dtype} {shape!r:.80}", None
    return None, Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])
