"""The CUDA C++ kernels as torch ops: where they can run, and their registration."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from memlm.cpu import lib_path

_glue = ctypes.CDLL(str(lib_path().with_name("_torch.so")))
_glue.memlm_torch_open_cuda.restype = ctypes.c_char_p
_glue.memlm_torch_cuda_reason.restype = ctypes.c_char_p


@functools.cache
def unavailable() -> str:
    """Why the kernels of ``libmemlm_cuda.so`` cannot run in this process; "" where they can, as far
    as can be told without asking a device."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver (libcuda.so.1)"
    library = Path(os.environ.get("MEMLM_CUDA_LIBRARY") or lib_path().with_name("libmemlm_cuda.so"))
    if not library.exists():
        return "memlm was installed without its CUDA kernels: no nvcc was there to compile them"
    return open_library(library)


def open_library(path) -> str:
    """Has the ops use the kernels of a library from now on.  Returns "", or what went wrong."""
    error = _glue.memlm_torch_open_cuda(str(path).encode())
    return error.decode() if error else ""


def register(namespace: str, key: str, name: str, or_reference: bool) -> bool:
    """Makes the kernel of op ``name`` that of ``<namespace>::<name>`` for a dispatch key; False where
    the open library has none.  What the kernel does not support is an error, or with
    ``or_reference`` left to ``memlm_reference::<name>``."""
    arguments = (namespace.encode(), key.encode(), name.encode(), or_reference)
    return bool(_glue.memlm_torch_register_cuda(*arguments))


def reason() -> str:
    """Why the kernel left its last call in this thread to the reference."""
    return _glue.memlm_torch_cuda_reason().decode()
