"""The GPU behind the emulator's interface: the tests of the CUDA kernels run on it with MEMLM_TEST_GPU=1
(``make test-gpu``)."""

from __future__ import annotations

import ctypes
import os
from ctypes import Structure, byref, c_void_p

import pytest
import torch

from memlm.cpu import lib_path


def wanted() -> bool:
    return bool(os.environ.get("MEMLM_TEST_GPU"))


def capability() -> str:
    """The compute capability that kernels run on by default: the GPU's, or the emulator's."""
    return ".".join(map(str, torch.cuda.get_device_capability())) if wanted() else "8.0"


class Copy:
    """The bytes that a tensor of the host spans, in device memory, as far from a multiple of 256 bytes
    as there, between bytes that nobody may write."""

    GUARD = 0xA5

    def __init__(self, tensor: torch.Tensor, device: str):
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        self.begin, self.size = tensor.data_ptr(), (last + 1) * tensor.element_size()
        self.whole = torch.full((self.size + 1024,), self.GUARD, dtype=torch.uint8, device=device)
        self.place = 256 + (self.begin - self.whole.data_ptr()) % 256
        self.bytes = self.whole[self.place : self.place + self.size]
        self.bytes.copy_(self._host())

    def _host(self) -> torch.Tensor:
        memory = (ctypes.c_uint8 * self.size).from_address(self.begin)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def has(self, pointer: int) -> bool:
        return self.begin <= pointer < self.begin + self.size

    def at(self, pointer: int) -> int:
        return self.bytes.data_ptr() + pointer - self.begin

    def back(self) -> None:
        """To the host.  Raises AssertionError where bytes beside it were written."""
        around = torch.cat((self.whole[: self.place], self.whole[self.place + self.size :]))
        assert bool((around == self.GUARD).all()), "written out of bounds"
        self._host().copy_(self.bytes)


def moved(value, copies: list[Copy]):
    """An argument, with the pointers to what was copied pointing to the copies."""
    if isinstance(value, c_void_p):
        return c_void_p(_pointer(value.value, copies))
    if isinstance(value, Structure):
        new = type(value).from_buffer_copy(value)
        for name, kind in value._fields_:
            if kind is c_void_p:
                setattr(new, name, _pointer(getattr(value, name), copies))
            elif issubclass(kind, Structure):
                setattr(new, name, moved(getattr(value, name), copies))
        return new
    if hasattr(value, "_obj"):  # byref(structure)
        return byref(moved(value._obj, copies))
    return value


def _pointer(pointer: int | None, copies: list[Copy]) -> int | None:
    """Into the copy of the tensor that begins there; or that has it, as tensors may share memory.  Host memory
    that was not copied, as memlm_packed.levels, stays where it is."""
    found = next((copy for copy in copies if pointer == copy.begin), None)
    found = found or next((copy for copy in copies if pointer and copy.has(pointer)), None)
    return found.at(pointer) if found else pointer


class Device:
    """A GPU and the library of kernels; as tests/emulator.py's Emulator, of which it has what tests of
    results need."""

    def __init__(self, library=None, device: str = "cuda"):
        self.lib = ctypes.CDLL(str(library or lib_path().with_name("libmemlm_cuda.so")))
        self.lib.memlm_cuda_last_error.restype = ctypes.c_char_p
        self.device = device

    def run(self, name: str, *arguments, read=(), written=()) -> None:
        from .emulator import NO_MEMORY, OK, Queue

        inputs = [Copy(t, self.device) for t in read if t is not None and t.numel()]
        outputs = [Copy(t, self.device) for t in written if t is not None and t.numel()]
        # What is read and written, as a residual that is y, has one copy: that which comes back.
        given = [moved(value, outputs + inputs) for value in arguments]
        on_gpu = self.device != "cpu"
        queue = Queue(stream=torch.cuda.current_stream().cuda_stream if on_gpu else None)
        function = getattr(self.lib, name)
        status = function(*given, byref(queue))
        if status == NO_MEMORY:
            size = queue.workspace_bytes + 256
            workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=self.device)
            queue.workspace = workspace.data_ptr() + -workspace.data_ptr() % 256
            status = function(*given, byref(queue))
        if status != OK:
            raise RuntimeError(self.lib.memlm_cuda_last_error().decode())
        if on_gpu:
            torch.cuda.synchronize()
        for copy in outputs:
            copy.back()

    def counts(self, run):
        pytest.skip("only the emulator counts")
