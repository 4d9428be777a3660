"""Safetensors files, written so that they can be used where they lie.

The file is an ordinary safetensors file (an 8-byte header length, a JSON header, the data:
https://huggingface.co/docs/safetensors).  Ours differ only in order and padding: the header is
padded with spaces to a multiple of 64 bytes, and tensors come in the order of the largest power of
two (up to 64) that divides their size.  So every tensor whose size is a multiple of 64 bytes, as
all packed codes are, starts at a multiple of 64 in the file and, mapped, in memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from memlm.errors import FormatError

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
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    """Writes ``tensors`` (any device, any strides) and returns the file's size in bytes.

    Atomic: the file appears under its name only when complete.  Memory: one tensor at a time.

    Raises TypeError for a dtype that safetensors does not know.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: safetensors holds no {tensor.dtype}")

    def size(name: str) -> int:
        return tensors[name].numel() * tensors[name].element_size()

    def divisor(name: str) -> int:
        return min(ALIGNMENT, size(name) & -size(name)) or ALIGNMENT

    order = sorted(tensors, key=lambda name: -divisor(name))
    header, position = {"__metadata__": metadata}, 0
    for name in order:
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position + size(name)],
        }
        position += size(name)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                flat = tensors[name].detach().cpu().contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return 8 + len(text) + position


def open_mapped(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, memory-mapped, and its metadata.

    Nothing is read until it is used and nothing is copied: the pages are the page cache's, shared
    with every other process that maps the file, until somebody writes to a tensor (which changes
    that process's copy, never the file).

    Raises FileNotFoundError, or FormatError for a file that is truncated or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, RuntimeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}") from None
