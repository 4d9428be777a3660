"""The torch ops over the CUDA kernels: their C++ code runs over the emulator; on a GPU it runs itself."""

import pytest
import torch

import memlm
from memlm import ops
from memlm.ops import _cuda

from . import emulated_torch


@pytest.mark.parametrize("what", ["weight_only", "unsupported", "registered"])
def test_over_the_emulator(what, tmp_path):
    emulated_torch.start(what, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_registered():
    assert _cuda.unavailable() in (
        "this torch was built without CUDA", "there is no CUDA driver (libcuda.so.1)"
    )  # fmt: skip
    assert list(ops.implementations("w4_matmul", "cuda")) == ["reference"]
    assert "CUDA: registered at csrc" not in torch._C._dispatch_dump("memlm::w4_matmul")


def test_open_library_says_what_is_wrong(tmp_path):
    assert "nowhere.so" in _cuda.open_library(tmp_path / "nowhere.so")
