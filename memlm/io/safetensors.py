"""Safetensors files, written so that they can be used where they lie.

The file is an ordinary safetensors file (an 8-byte header length, a JSON header, the data:
https://huggingface.co/docs/safetensors).  Ours differ only in order and padding: the header is
padded with spaces to a multiple of 64 bytes, and tensors come in the order of the largest power of
two (up to 64) that divides their size.  So every tensor whose size is a multiple of 64 bytes, as
all packed codes are, starts at a multiple of 64 in the file and, mapped, in memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from memlm.io._header import MAX_BYTES, METADATA, read_header
from memlm.io.files import replacing

ALIGNMENT = 64
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_BY_CODE = {code: dtype for dtype, code in _DTYPES.items()}


def write(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    """Writes ``tensors`` (any device, any strides) and returns the file's size in bytes.

    Atomic: the file appears under its name only when complete.  Memory: one tensor at a time.

    Raises TypeError for a dtype that safetensors does not know, a tensor without dense data, a
    name or metadata that are not strings; ValueError for the name that the format reserves or a
    header that is too long.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: the name {name!r} is not a string")
        if name == METADATA:
            raise ValueError(f"tensors: the name {name!r} is reserved")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensors: {name}: safetensors holds no {tensor.dtype}")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise TypeError(
                f"tensors: {name}: has no dense data (device {tensor.device}, {tensor.layout})"
            )
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError(f"metadata: got {metadata!r:.200}, accepted are strings only")

    def divisor(name: str) -> int:
        size = tensors[name].nbytes
        return min(ALIGNMENT, size & -size) or ALIGNMENT

    # Sizes fall from multiples of 64 to smaller powers of two, so each tensor starts at a multiple
    # of its own: there are no holes, and every element is aligned.
    order = sorted(tensors, key=divisor, reverse=True)
    header, position = {METADATA: metadata}, 0
    for name in order:
        end = position + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_BYTES:
        raise ValueError(f"tensors: a header of {len(text)} bytes; at most {MAX_BYTES} are read")

    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
            file.write(data.numpy())
    return 8 + len(text) + position


def open_mapped(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, memory-mapped, and its metadata.

    Nothing is read until it is used and nothing is copied (but for tensors that do not lie at a
    multiple of their element's size): the pages are the page cache's, shared with every other
    process that maps the file, until somebody writes to a tensor (which changes that process's
    copy, never the file).  All tensors share one storage, in the order of the file.

    Raises FileNotFoundError, or FormatError for a file that is truncated or malformed.
    """
    path = Path(path)
    entries, metadata = read_header(path)
    data = map_file(path)
    tensors = {}
    for name, entry in entries.items():
        raw, dtype = data[entry.start : entry.end], _BY_CODE[entry.dtype]
        if entry.start % dtype.itemsize:
            raw = raw.clone()
        tensors[name] = raw.view(dtype).view(entry.shape)
    return tensors, metadata


def map_file(path: Path) -> torch.Tensor:
    """A file's bytes, mapped for this process alone: uint8 [size]."""
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
