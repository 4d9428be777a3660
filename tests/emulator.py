"""The CUDA kernels of csrc/cuda, compiled for the emulator in tests/cuda_emulator and called through the
C ABI.  Tensors lie in ordinary memory; a kernel may touch those that a call names, and nothing else."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch

from memlm.formats import NF4_LEVELS

from . import device

ROOT = Path(__file__).parent.parent
HERE = ROOT / "tests" / "cuda_emulator"
KERNELS = ROOT / "csrc" / "cuda"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OK, INVALID, NO_MEMORY, UNSUPPORTED = range(4)
# Compute capability -> what the emulated device has: multiprocessors, bytes of shared memory for a block.
DEVICES = {750: (68, 64 << 10), 800: (108, 163 << 10)}


class Packed(Structure):
    """memlm_packed"""

    _fields_ = [
        ("codes", c_void_p), ("scales", c_void_p), ("offsets", c_void_p), ("scale_dtype", c_int),
        ("n", c_int64), ("k", c_int64), ("group", c_int64), ("levels", c_void_p), ("pattern", c_int),
        ("starts", c_void_p), ("places", c_void_p),
    ]  # fmt: skip


class MatmulArgs(Structure):
    """memlm_matmul_args"""

    _fields_ = [
        ("m", c_int64), ("x", c_void_p), ("x_stride", c_int64), ("bias", c_void_p), ("y", c_void_p),
        ("y_stride", c_int64), ("dtype", c_int), ("fast", c_int), ("threads", c_int), ("norm", c_void_p),
        ("norm_eps", c_float), ("swiglu", c_int), ("residual", c_void_p), ("residual_stride", c_int64),
    ]  # fmt: skip


class Queue(Structure):
    """memlm_cuda_queue"""

    _fields_ = [("stream", c_void_p), ("workspace", c_void_p), ("workspace_bytes", c_int64)]


class Counts(Structure):
    """emulator_counts"""

    _fields_ = [
        (name, c_int64)
        for name in (
            "read_requests read_sectors write_requests write_sectors distinct_read distinct_written "
            "shared_requests shared_passes shared_least mmas barriers blocks"
        ).split()
    ]


class Launch(Structure):
    """emulator_launch"""

    _fields_ = [("kernel", c_int64), ("blocks", c_int64), ("threads", c_int32), ("shared_bytes", c_int32)]


class KernelError(RuntimeError):
    """What the emulator found wrong with a kernel."""


NF4 = (c_float * 16)(*NF4_LEVELS)


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def packed_struct(packed) -> Packed:
    """Of a memlm.formats.Packed or memlm.sparse_formats.SparsePacked."""
    sparse = hasattr(packed, "places")
    values = packed.format.values if sparse else packed.format
    floats = sparse and packed.format.is_float
    w = Packed(
        codes=pointer(packed.codes), scales=pointer(packed.scales), offsets=pointer(packed.offsets),
        n=packed.n, k=packed.k, group=32 if floats else values.group,
    )  # fmt: skip
    w.scale_dtype = 0 if packed.scales is None else DTYPES[packed.scales.dtype]
    if not floats and values.codebook == "nf":
        w.levels = ctypes.addressof(NF4)
    if sparse:
        w.pattern = {"2:4": 1, "unstructured": 2, "block": 3}[packed.format.pattern]
        w.starts, w.places = pointer(packed.starts), pointer(packed.places)
    return w


def _object(source: Path, flags: list[str], cache: Path) -> Path:
    """The compiled source, instrumented if it holds kernels; kept until it or a header changes."""
    kernels = source.suffix == ".cu"
    command = ["g++", "-std=c++17", "-O1" if kernels else "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
               "-w", *flags, *(["-fsanitize=thread"] if kernels else [])]  # fmt: skip
    headers = [*HERE.glob("*.h"), *(h for f in (".", "..", "../include", "../cpu") for h in (KERNELS / f).glob("*.h"))]
    digest = hashlib.sha256(repr(command).encode())
    for part in (source, *sorted(headers)):
        digest.update(part.read_bytes())
    made = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not made.exists():
        new = made.with_suffix(f".{os.getpid()}")
        command += ["-I", HERE, "-I", KERNELS, "-x", "c++", "-c", source, "-o", new]
        subprocess.run(command, check=True)
        new.rename(made)
    return made


def _library(sources: list[Path], arch: int) -> Path:
    """The sources and the emulator, linked."""
    cache = ROOT / "build" / "emulated"
    cache.mkdir(parents=True, exist_ok=True)
    flags = [f"-DMEMLM_EMULATED_ARCH={arch}"]
    with open(cache / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        objects = list(pool.map(lambda s: _object(s, flags, cache), [HERE / "emulator.cpp", *sources]))
        name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        library = cache / f"{name}.so"
        if not library.exists():
            new = library.with_suffix(f".{os.getpid()}")
            subprocess.run(["g++", "-shared", *objects, "-ldl", "-o", new], check=True)
            new.rename(library)
    return library


class Emulator:
    """A library of kernels.  ``call`` runs one of its C functions."""

    def __init__(self, library: Path, arch: int):
        self.path, self.arch = library, arch
        self.lib = ctypes.CDLL(str(library))
        self.lib.emulator_error.restype = ctypes.c_char_p
        self.lib.emulator_register.argtypes = [c_void_p, c_size_t, c_int]
        self.lib.emulator_seed.argtypes = [c_uint64]
        self.lib.emulator_get.argtypes = [POINTER(Counts)]
        self.lib.emulator_device(arch, *DEVICES[arch])
        self.seed = 0

    def call(self, name: str, *arguments, read=(), written=()) -> int:
        """The result of C function ``name``, whose kernels may read the tensors ``read`` and write
        those of ``written``.  Raises KernelError for what they must not do."""
        function = getattr(self.lib, name)
        function.restype = c_int
        self.seed += 1
        self.lib.emulator_seed(self.seed)
        self.lib.emulator_forget()
        for tensors, writable in ((read, 0), (written, 1)):
            for tensor in tensors:
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
                    size = (last + 1) * tensor.element_size() if tensor.numel() else 0
                    assert tensor.data_ptr() + size <= storage.data_ptr() + storage.nbytes()
                    self.lib.emulator_register(tensor.data_ptr(), size, writable)
        status = function(*arguments)
        error = self.lib.emulator_error().decode()
        if error:
            raise KernelError(self.located(error))
        return status

    def run(self, name: str, *arguments, read=(), written=()) -> None:
        """As :meth:`call`, for the functions of memlm_cuda.h: with a queue as their last argument, whose
        workspace is given as they ask for it.  Raises RuntimeError with their message."""
        queue = Queue()
        status = self.call(name, *arguments, byref(queue), read=read, written=written)
        if status == NO_MEMORY:
            workspace = torch.full((queue.workspace_bytes + 256,), 0xFF, dtype=torch.uint8)
            workspace = workspace[-workspace.data_ptr() % 256 :][: queue.workspace_bytes]
            queue.workspace = workspace.data_ptr()
            status = self.call(name, *arguments, byref(queue), read=read, written=[*written, workspace])
        if status != OK:
            self.lib.memlm_cuda_last_error.restype = ctypes.c_char_p
            raise RuntimeError(self.lib.memlm_cuda_last_error().decode())

    def located(self, error: str) -> str:
        """The error with file and line instead of the instruction's offset."""
        found = re.search(r"\+(0x[0-9a-f]+)$", error)
        if not found:
            return error
        command = ["addr2line", "-e", self.path, found[1]]
        line = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return error[: found.start()] + f"at {Path(line).name}"

    def counts(self, run) -> Counts:
        """What the kernels that ``run()`` launches did to memory."""
        self.lib.emulator_count(1)
        try:
            run()
            counts = Counts()
            self.lib.emulator_get(byref(counts))
        finally:
            self.lib.emulator_count(0)
        return counts

    def launches(self, run, arch: int, processors: int, shared_bytes: int) -> dict[str, Launch]:
        """What ``run()`` would launch on such a device, by the kernel's mangled name; nothing is run."""
        self.lib.emulator_device(arch, processors, shared_bytes)
        self.lib.emulator_log(1)
        try:
            run()
        finally:
            self.lib.emulator_log(0)
            self.lib.emulator_device(self.arch, *DEVICES[self.arch])
        first = POINTER(Launch)()
        self.lib.emulator_logged.restype = c_int64
        count = self.lib.emulator_logged(byref(first))
        # Copies: the next call writes there again.
        return {self._symbols[first[i].kernel]: Launch.from_buffer_copy(first[i]) for i in range(count)}

    @functools.cached_property
    def _symbols(self) -> dict[int, str]:
        listed = subprocess.run(["nm", self.path], check=True, capture_output=True, text=True).stdout
        rows = (line.split() for line in listed.splitlines())
        return {int(row[0], 16): row[2] for row in rows if len(row) == 3 and row[1] in "tTwW"}


def emulator(arch: int = 800) -> Emulator:
    """Of csrc/cuda, as compiled for a compute capability; with MEMLM_TEST_GPU the GPU."""
    return _emulator(arch)


@functools.cache
def _emulator(arch: int) -> Emulator:
    if device.wanted():
        if arch != 800:
            pytest.skip("only the emulator can be another device")
        return device.Device()
    return Emulator(_library(sorted(KERNELS.glob("*.cu")), arch), arch)


@functools.cache
def emulator_of(source: Path) -> Emulator:
    """Of a test's own kernels."""
    return Emulator(_library([source], 800), 800)


def matmul(
    name: str, x, packed, bias, norm=None, eps=0.0, swiglu=False, residual=None, arch: int = 800, before=(),
    after=(), read=(), dtype=None,
) -> torch.Tensor:  # fmt: skip
    """The product of the op ``name`` by its emulated kernel: ``x [..., k]`` -> ``[..., n]``, or half of
    that with swiglu, in ``dtype``, by default x's.  ``before`` and ``after``: the C function's arguments
    behind W, and behind memlm_matmul_args; ``read``: what tensors they point to."""
    rows, dtype = x.reshape(-1, packed.k), dtype or x.dtype
    columns = packed.n // 2 if swiglu else packed.n
    y = torch.full((len(rows), columns), float("nan"), dtype=dtype)
    residual_rows = None if residual is None else residual.reshape(-1, columns)
    args = MatmulArgs(
        m=len(rows), x=pointer(rows), x_stride=rows.stride(0) if len(rows) > 1 else packed.k,
        bias=pointer(bias), y=pointer(y), y_stride=columns, dtype=DTYPES[dtype], norm=pointer(norm),
        norm_eps=eps, swiglu=swiglu, residual=pointer(residual_rows), residual_stride=columns,
    )  # fmt: skip
    w = packed_struct(packed)
    if name == "block_sparse_matmul":
        before = (packed.format.bits, *before)
    read = [rows, bias, norm, residual_rows, *packed.tensors().values(), *read]
    emulator(arch).run(
        f"memlm_cuda_{name}", byref(w), *before, byref(args), *after, read=read, written=[y]
    )
    return y.view(*x.shape[:-1], columns)
