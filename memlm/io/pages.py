"""The pages of mapped files: what is read ahead, and what is let go (madvise(2), Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_READ = 22  # Linux 5.14


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
    come back when they are used.  Only for tensors that nobody has written to: a changed page would
    be the file's again."""
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
