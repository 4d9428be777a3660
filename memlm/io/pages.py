"""A file's bytes in memory, page by page (mmap(2), madvise(2); Linux).

    mapped      the page cache's pages, read when they are first used, shared with all processes that
                map the file, given back when memory runs short: nothing is copied
    populated   the same, all read and entered into this process's page table at once: the first pass
                over them meets no page faults
    huge        a copy in this process's own memory, in pages of 2 MB: fewer address translations,
                prefetching that runs on where a 4 KB page ends; private memory, and a copy to wait for

docs/files.md has what each costs and gives.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch

HOW = ("mapped", "populated", "huge")
HUGE_PAGE = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_READ = 22  # Linux 5.14


def check_how(how: str) -> str:
    if how not in HOW:
        raise ValueError(f"pages: got {how!r}, accepted are {', '.join(HOW)}")
    return how


def open_file(path: str | Path, how: str = "mapped") -> torch.Tensor:
    """A file's bytes, uint8 [size], in pages as ``how`` says.  Whoever writes to them changes this
    process's copy of a page, never the file.  Raises ValueError for another ``how``."""
    path, size = Path(path), Path(path).stat().st_size
    if check_how(how) == "huge":
        return _copied(path, size)
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    data = torch.empty(0, dtype=torch.uint8).set_(storage)
    if how == "populated":
        populate(data)
    return data


def _copied(path: Path, size: int) -> torch.Tensor:
    # Anonymous memory starts at any 4 KB page: one more huge page leaves room to start at one.
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    data = whole[start : start + size]
    _advise(whole, mmap.MADV_HUGEPAGE)  # a wish: the kernel may have none free
    view, done = memoryview(data.numpy()), 0
    with open(path, "rb", buffering=0) as file:
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise OSError(f"{path}: became shorter while it was read")
            done += count
    return data


def read_ahead(tensor: torch.Tensor) -> None:
    """Has the kernel start reading a mapped tensor's bytes; returns at once."""
    _advise(tensor, mmap.MADV_WILLNEED)


def populate(tensor: torch.Tensor) -> None:
    """Reads all of a mapped tensor and enters its pages into this process's table, so that the
    first use meets no page fault.  On kernels before 5.14 as :func:`read_ahead`."""
    if not _advise(tensor, _MADV_POPULATE_READ):
        read_ahead(tensor)


def release(tensor: torch.Tensor) -> None:
    """Takes a mapped tensor's pages out of this process's memory; they stay in the page cache, and
    come back when they are used.  Only for what is mapped and nobody has written to: a changed page
    would be the file's again, memory that is no file's would be lost."""
    _advise(tensor, mmap.MADV_DONTNEED)


def _advise(tensor: torch.Tensor, advice: int) -> bool:
    """Gives advice on the whole pages that the tensor covers."""
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end <= start:
        return True
    return _libc.madvise(start, end - start, advice) == 0


def drop_from_cache(path: str | os.PathLike) -> None:
    """Has the kernel forget a file's cached pages that nobody maps (what is dirty is written first):
    for measuring with cold files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
