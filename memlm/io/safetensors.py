"""Safetensors files, written so that they can be used where they lie.

The file is an ordinary safetensors file (an 8-byte header length, a JSON header, the data:
https://huggingface.co/docs/safetensors).  Ours differ only in order and padding: the header is
padded with spaces to a multiple of 64 bytes, and tensors come in the order of the largest power of
two (up to 64) that divides their size.  So every tensor whose size is a multiple of 64 bytes, as
all packed codes are, starts at a multiple of 64 in the file and, mapped, in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch

from memlm.errors import FormatError
from memlm.io._header import MAX_BYTES, METADATA, read_header
from memlm.io.files import replacing
from memlm.io.pages import open_file

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
_CHECKSUMS = "sha256"  # of each tensor's bytes, in the order of the file, spaces between
_PIECE = 1 << 20  # bytes copied at a time
_BY_CODE = {code: dtype for dtype, code in _DTYPES.items()}


def write(
    path: str | Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    sync: bool = True,
    together: Iterable[Collection[str]] = (),
) -> int:
    """Writes ``tensors`` (any device, any strides) and returns the file's size in bytes.  The
    metadata gain ``sha256``, those of the tensors' bytes, which :func:`verify` compares.

    ``together``: names of tensors that are to stay one behind the other, whatever their sizes.

    Atomic: the file appears under its name only when complete, and, with ``sync``, on the disk.
    Memory: one tensor at a time.

    Raises TypeError for a dtype that safetensors does not know, a tensor without dense data, a
    name or metadata that are not strings; ValueError for the name that the format reserves or a
    header that is too long.
    """
    kinds = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors: the name {name!r} is not a string")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensors: {name}: safetensors holds no {tensor.dtype}")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise TypeError(
                f"tensors: {name}: has no dense data (device {tensor.device}, {tensor.layout})"
            )
        kinds[name] = (_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)

    def data(name: str) -> Iterator[memoryview]:
        raw = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
        yield memoryview(raw.numpy())

    return _write(path, kinds, data, metadata, sync, together=together)


def write_each(
    path: str | Path,
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    metadata: dict[str, str],
) -> int:
    """As :func:`write`, for tensors that ``read(name)`` gives when their turn comes, of the types and
    shapes that ``kinds`` says: memory holds one of them."""
    entries = {
        name: (_DTYPES[dtype], shape, math.prod(shape) * dtype.itemsize)
        for name, (dtype, shape) in kinds.items()
    }

    def data(name: str) -> Iterator[memoryview]:
        raw = read(name).contiguous()
        assert (raw.dtype, tuple(raw.shape)) == kinds[name], name
        yield memoryview(raw.view(-1).view(torch.uint8).numpy())

    return _write(path, entries, data, metadata, True)


def join(
    path: str | Path,
    parts: list[str | Path],
    order: Callable[[Iterable[str]], Iterable[str]],
    metadata: dict[str, str],
    together: Callable[[Iterable[str]], Iterable[Collection[str]]] = lambda names: (),
) -> int:
    """Writes a file of all tensors of other files that :func:`write` made, as it does, without
    computing their checksums again; ``order`` takes their names and returns them in the order
    wanted, ``together`` what :func:`write` calls so."""
    entries, file_of, digests = {}, {}, {}
    for part in map(Path, parts):
        found, given = read_header(part)
        entries |= found
        file_of |= dict.fromkeys(found, part)
        digests |= zip(found, given[_CHECKSUMS].split())
    kinds = {name: (e.dtype, e.shape, e.end - e.start) for name, e in entries.items()}

    def data(name: str) -> Iterator[memoryview]:
        return _pieces(file_of[name], entries[name].start, entries[name].end)

    ordered = {name: kinds[name] for name in order(kinds)}
    return _write(path, ordered, data, metadata, True, digests, together(kinds))


def verify(path: str | Path) -> bool:
    """Compares a file's bytes with the checksums in its metadata; False where there are none.
    Raises FormatError naming the tensor for a file that is damaged."""
    path = Path(path)
    entries, metadata = read_header(path)
    if _CHECKSUMS not in metadata:
        return False
    given = metadata[_CHECKSUMS].split()
    if len(given) != len(entries):
        raise FormatError(f"{path}: damaged: {len(given)} checksums of {len(entries)} tensors")
    for (name, entry), wanted in zip(entries.items(), given):
        digest = hashlib.sha256()
        for piece in _pieces(path, entry.start, entry.end):
            digest.update(piece)
        if digest.hexdigest() != wanted:
            raise FormatError(f"{path}: damaged: {name:.80} is not what its checksum says")
    return True


def _pieces(path: Path, start: int, end: int) -> Iterator[memoryview]:
    """Bytes ``start`` to ``end`` of a file, one piece after the other in the same memory."""
    buffer = memoryview(bytearray(min(_PIECE, end - start)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            count = file.readinto(buffer[: end - start])
            if not count:
                raise FormatError(f"{path}: became shorter while it was read")
            yield buffer[:count]
            start += count


def _write(
    path: str | Path,
    kinds: dict[str, tuple[str, tuple[int, ...], int]],
    data: Callable[[str], Iterator[memoryview]],
    metadata: dict[str, str],
    sync: bool,
    digests: dict[str, str] | None = None,
    together: Iterable[Collection[str]] = (),
) -> int:
    """``kinds``: name -> (dtype, shape, bytes); ``data(name)`` yields its bytes, ``digests`` has
    their checksums, if they are known."""
    if METADATA in kinds:
        raise ValueError(f"tensors: the name {METADATA!r} is reserved")
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError(f"metadata: got {metadata!r:.200}, accepted are strings only")

    divisors = {
        name: min(ALIGNMENT, size & -size) or ALIGNMENT for name, (_, _, size) in kinds.items()
    }
    for names in together:
        divisors |= dict.fromkeys(names, min((divisors[name] for name in names), default=0))

    # Sizes fall from multiples of 64 to smaller powers of two, so each tensor starts at a multiple
    # of its own: there are no holes, and every element is aligned.
    order = sorted(kinds, key=divisors.get, reverse=True)
    unknown = "0" * hashlib.sha256().digest_size * 2  # as long as a checksum, not known yet
    sums = dict.fromkeys(order, unknown) if digests is None else digests
    header, position = {METADATA: metadata}, 0
    for name in order:
        dtype, shape, size = kinds[name]
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += size

    def text() -> bytes:
        # Readers sort by offset: empty tensors, which share one, keep the header's order.
        header[METADATA] = {**metadata, _CHECKSUMS: " ".join(sums[name] for name in order)}
        made = json.dumps(header, separators=(",", ":")).encode()
        made += b" " * (-(8 + len(made)) % ALIGNMENT)
        return len(made).to_bytes(8, "little") + made

    head = text()
    if len(head) - 8 > MAX_BYTES:
        raise ValueError(
            f"tensors: a header of {len(head) - 8} bytes; at most {MAX_BYTES} are read"
        )
    with replacing(path, sync) as file:
        file.write(head)
        for name in order:
            digest = hashlib.sha256()
            for piece in data(name):
                if digests is None:
                    digest.update(piece)
                file.write(piece)
            if digests is None:
                sums[name] = digest.hexdigest()
        if digests is None:
            file.seek(0)
            file.write(text())
    return len(head) + position


def open_mapped(
    path: str | Path, pages: str = "mapped"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, memory-mapped, and its metadata; ``pages`` as
    :mod:`memlm.io.pages` has it.

    Nothing is read until it is used and nothing is copied (but for tensors that do not lie at a
    multiple of their element's size): the pages are the page cache's, shared with every other
    process that maps the file, until somebody writes to a tensor (which changes that process's
    copy, never the file).  All tensors share one storage, in the order of the file.

    Raises FileNotFoundError, or FormatError for a file that is truncated or malformed.
    """
    path = Path(path)
    entries, metadata = read_header(path)
    data = open_file(path, pages)
    tensors = {}
    for name, entry in entries.items():
        raw, dtype = data[entry.start : entry.end], _BY_CODE[entry.dtype]
        if entry.start % dtype.itemsize:
            raw = raw.clone()
        tensors[name] = raw.view(dtype).view(entry.shape)
    return tensors, metadata
