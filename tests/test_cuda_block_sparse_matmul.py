"""block_sparse_matmul on the emulated GPU: csrc/cuda/block_sparse_matmul.cu."""

import ctypes
from ctypes import byref

import pytest
import torch

from memlm import sparse_formats

from . import block_sparse_gradients, emulator, numerics
from .cuda_sparse_checks import Sparse
from .matmul_checks import random_case


class TestBlockSparseMatmul(Sparse):
    OP = "block_sparse_matmul"
    FORMATS = [
        "block/int4a-g32", "block/int8-g32", "block/int2a-g32", "block/nf4-g32", "block/f32",
        "block/bf16",
    ]  # fmt: skip
    SOME = ["block/int4-g32", "block/int8-g32", "block/int2-g32", "block/nf4-g32"]
    ANOTHER = "2:4/int4-g32"

    def test_not_finite(self, dtype):
        for name in ("block/int4a-g32", "block/f32"):
            self.check_not_finite(name, dtype)

    @pytest.mark.parametrize("name, bits", [("block/f32", 32), ("block/bf16", 16)])
    def test_floats_on_turing(self, name, bits):
        x, packed, _ = random_case(name, 20, 96, 6, torch.float16)
        with pytest.raises(RuntimeError, match=f"bits: got {bits} on compute capability 7.5"):
            emulator.matmul(self.OP, x, packed, None, arch=750)


GRADIENT_SHAPES = [(1, 1, 1), (17, 33, 5), (100, 300, 70), (48, 64, 0)]


def run_gradient(name: str, packed, *arguments, out: torch.Tensor, arch: int) -> torch.Tensor:
    """memlm_cuda_block_sparse_``name`` of W and further arguments, tensors and numbers."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    w = emulator.packed_struct(packed)
    out.fill_(float("nan"))
    emulator.emulator(arch).run(
        f"memlm_cuda_block_sparse_{name}", byref(w), *given, ctypes.c_void_p(out.data_ptr()),
        read=[*tensors, *packed.tensors().values()], written=[out],
    )  # fmt: skip
    return out


def check_gradient_of_x(name: str, n: int, k: int, m: int, arch: int = 800):
    packed, grad, expected = block_sparse_gradients.of_x(name, n, k, m)
    rows = ctypes.c_int64(m)
    got = run_gradient("grad_x", packed, packed.format.bits, rows, grad, out=torch.empty(m, k), arch=arch)
    numerics.assert_within(got, *expected)


def check_gradient_of_values(n: int, k: int, m: int, arch: int = 800):
    packed, grad, x = block_sparse_gradients.of_values(n, k, m)
    rows, out = ctypes.c_int64(m), torch.empty_like(packed.codes)
    got = run_gradient("grad_values", packed, rows, grad, x, out=out, arch=arch)
    block_sparse_gradients.assert_values(got, packed, grad, x)


@pytest.mark.parametrize("name", TestBlockSparseMatmul.FORMATS)
def test_gradient_of_x(name):
    for n, k, m in GRADIENT_SHAPES:
        check_gradient_of_x(name, n, k, m)


def test_gradient_of_values():
    for n, k, m in GRADIENT_SHAPES:
        check_gradient_of_values(n, k, m)


def test_gradients_on_turing():
    check_gradient_of_x("block/int4-g32", 40, 100, 9, arch=750)
    check_gradient_of_values(40, 100, 9, arch=750)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("name", TestBlockSparseMatmul.FORMATS)
def test_every_gradient(name):
    for n, k, m in [(700, 130, 65), (33, 1057, 129)]:
        check_gradient_of_x(name, n, k, m)
        check_gradient_of_values(n, k, m)


def dequantized(packed, row: int, rows: int, dtype: torch.dtype, arch: int = 800) -> torch.Tensor:
    out = torch.full((rows, packed.k), float("nan"), dtype=dtype)
    emulator.emulator(arch).run(
        "memlm_cuda_block_sparse_dequantize", byref(emulator.packed_struct(packed)), packed.format.bits,
        ctypes.c_int64(row), ctypes.c_int64(rows), emulator.DTYPES[dtype], ctypes.c_void_p(out.data_ptr()),
        read=packed.tensors().values(), written=[out],
    )  # fmt: skip
    return out


@pytest.mark.parametrize("name", TestBlockSparseMatmul.FORMATS)
def test_dequantize(name):
    """To the last bit."""
    for n, k in [(1, 1), (17, 33), (40, 2100)]:
        packed = random_case(name, n, k, 1, torch.float32)[1]
        for dtype in emulator.DTYPES:
            expected = sparse_formats.dequantize(packed, dtype)
            for row, rows in [(0, n), (n // 3, n - n // 3), (n - 1, 1), (n, 0)]:
                part = dequantized(packed, row, rows, dtype)
                assert torch.equal(part, expected[row : row + rows])
    assert torch.equal(dequantized(packed, 0, n, torch.float16, 750), sparse_formats.dequantize(packed, torch.float16))


def test_dequantize_bad_input():
    packed = random_case("block/int4-g32", 20, 96, 1, torch.float32)[1]
    for row, rows in [(-1, 3), (0, 21), (18, 3), (2**62, 2**62)]:
        with pytest.raises(RuntimeError, match=f"rows: got {rows} from {row} on, W has 20"):
            w, out = emulator.packed_struct(packed), torch.empty(20, 96)
            given = (ctypes.c_int64(row), ctypes.c_int64(rows), 0, ctypes.c_void_p(out.data_ptr()))
            emulator.emulator().run("memlm_cuda_block_sparse_dequantize", byref(w), 4, *given)
