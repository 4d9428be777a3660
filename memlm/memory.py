"""This process's memory as the kernel accounts for it (Linux), and what it is made of."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing memlm.memory imports no torch
    import torch
    from torch import nn

    from memlm.kv_cache import PagedKVCache

_SMAPS, _STATUS = Path("/proc/self/smaps"), Path("/proc/self/status")
_CLEAR_REFS, _PAGEMAP = Path("/proc/self/clear_refs"), Path("/proc/self/pagemap")
_FIELDS = {"Rss:": "resident", "Anonymous:": "private"}
_PRESENT = 63  # the bit of a pagemap entry that says: this page is in RAM
_ENTRY = 8  # bytes of an entry
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
RETURNED = 128 * 1024  # where glibc's own limit starts


@dataclass
class Mapping:
    """A file's pages in this process, in bytes: ``size`` mapped, ``resident`` in memory (shared
    with the page cache), ``private`` copied for this process alone."""

    size: int = 0
    resident: int = 0
    private: int = 0


@dataclass
class _Region(Mapping):
    """One line of smaps: addresses ``start`` to ``end``, of the file ``path`` ("": of none)."""

    start: int = 0
    end: int = 0
    path: str = ""


@dataclass(frozen=True)
class Account:
    """Resident bytes of this process by part.  Without ``temporary`` the parts add up to its
    resident memory now, with it to the peak since :func:`reset_peak`.

    mapped_weights: pages of the files that hold the model's tensors, shared with the page cache
        and so with every process that maps them.
    private_weights: the model's tensors elsewhere, and pages of those files copied for this
        process.
    kv_cache: touched pages of the cache's storage.
    torch_python: anonymous memory at :func:`baseline` (what importing took), and the pages of
        all other mapped files now: libraries' code and data, read as they are first used.
    rest: what is none of these: other tensors, what malloc holds back, libraries' buffers.
    temporary: the peak beyond what is resident now: activations, logits, workspaces, all freed.
    """

    mapped_weights: int
    private_weights: int
    kv_cache: int
    torch_python: int
    rest: int
    temporary: int

    @property
    def resident(self) -> int:
        return self.peak - self.temporary

    @property
    def peak(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def resident_bytes() -> int:
    """Bytes of this process's memory that are in RAM, file pages included."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that :func:`resident_bytes` was since the process began, or :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Lets :func:`peak_bytes` begin anew from what is resident now (proc(5), clear_refs)."""
    _CLEAR_REFS.write_text("5")


def return_freed() -> bool:
    """From now on malloc gives every block of RETURNED bytes or more back to the kernel when it is
    freed (mallopt(3), M_MMAP_THRESHOLD).  Whether this C library's malloc can (glibc's).

    By default glibc raises that limit to the largest block freed so far, up to 32 MB, and keeps
    what is freed below it: the holes that tensors of different sizes and lifetimes leave there add
    tens of percent to a process's memory.  The price is that the kernel clears each new block's
    pages again (docs/memory.md has figures).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return mallopt(_MMAP_THRESHOLD, RETURNED) == 1


def baseline() -> int:
    """Anonymous bytes of this process now: to be asked when all is imported and no model loaded,
    and handed to :func:`account`."""
    return sum(region.private for region in _regions())


def account(base: int, model: nn.Module | None = None, cache: PagedKVCache | None = None) -> Account:
    """What this process's resident memory is made of.  ``base`` is what :func:`baseline` said
    before ``model`` was loaded; ``cache`` is the KV cache that is held, if any."""
    peak, regions = peak_bytes(), list(_regions())
    weights = [] if model is None else [*model.parameters(), *model.buffers()]
    private, mapped = _split(weights, regions)
    caches, _ = _split([] if cache is None else [*cache.pools, *cache.tails], regions)
    resident = sum(region.resident for region in regions)
    parts = {
        "mapped_weights": sum(region.resident - region.private for region in mapped),
        "private_weights": _present(private) + sum(region.private for region in mapped),
        "kv_cache": _present(caches),
        "torch_python": base
        + sum(r.resident - r.private for r in regions if not any(r is m for m in mapped)),
    }
    rest = resident - sum(parts.values())
    return Account(**parts, rest=rest, temporary=max(0, peak - resident))


def resident_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each once, whose pages are in RAM."""
    return _present(_split(tensors, [])[0])


def file_mapping(path: str | Path) -> Mapping:
    """What /proc/self/smaps says of all mappings of ``path``."""
    wanted, found = str(Path(path).resolve()), Mapping()
    for region in _regions():
        if region.path == wanted:
            found.size += region.size
            found.resident += region.resident
            found.private += region.private
    return found


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS}: has no {key}")


def _regions() -> Iterator[_Region]:
    region = None
    for line in _SMAPS.read_text().splitlines():
        head, *rest = line.split(maxsplit=5)
        if not head.endswith(":"):  # "start-end perms offset device inode path"
            if region is not None:
                yield region
            start, end = (int(part, 16) for part in head.split("-"))
            path = rest[4] if len(rest) == 5 and rest[3] != "0" else ""
            region = _Region(end - start, start=start, end=end, path=path)
        elif head in _FIELDS:
            setattr(region, _FIELDS[head], int(rest[0]) * 1024)
    if region is not None:
        yield region


def _split(
    tensors: Iterable[torch.Tensor], regions: list[_Region]
) -> tuple[list[tuple[int, int]], list[_Region]]:
    """(start, end) of the tensors' storages that lie in anonymous memory, and the file mappings
    that hold the others; each once."""
    files = [region for region in regions if region.path]
    private, mapped = {}, {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if not start:  # empty, or on the meta device
            continue
        home = next((r for r in files if r.start <= tensor.data_ptr() < r.end), None)
        if home is None:
            private[start] = (start, start + storage.nbytes())
        else:
            mapped[home.start] = home
    return list(private.values()), list(mapped.values())


def _present(ranges: list[tuple[int, int]]) -> int:
    """Bytes of the address ranges whose pages are in RAM (Linux, admin-guide/mm/pagemap)."""
    import mmap

    import numpy as np

    total = 0
    with open(_PAGEMAP, "rb", buffering=0) as file:
        for start, end in ranges:
            first, last = start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
            file.seek(first * _ENTRY)
            entries = np.frombuffer(file.read((last - first) * _ENTRY), np.uint64)
            pages = first + np.flatnonzero(entries >> np.uint64(_PRESENT))
            begins = np.maximum(pages * mmap.PAGESIZE, start)
            ends = np.minimum((pages + 1) * mmap.PAGESIZE, end)
            total += int((ends - begins).sum())
    return total
