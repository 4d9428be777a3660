"""w4_sparse_dequantize on the emulated GPU: csrc/cuda/w4_sparse_dequantize.cu."""

from ctypes import byref, c_int64, c_void_p

import pytest
import torch

from memlm import sparse_formats
from memlm.sparse_formats import SparsePacked

from .emulator import DTYPES, emulator, packed_struct, pointer
from .matmul_checks import off_by_one
from .test_cuda_dequantize import filled
from .test_w4_sparse_dequantize import FORMATS, packed_of

archs = pytest.mark.parametrize("arch", [800, 750])


def dequantize(packed, row, rows, dtype, arch=800, aligned=True):
    out = filled(rows, packed.k, dtype, aligned)
    emulator(arch).run(
        "memlm_cuda_w4_sparse_dequantize", byref(packed_struct(packed)), c_int64(row), c_int64(rows),
        DTYPES[dtype], c_void_p(pointer(out)), read=packed.tensors().values(), written=[out],
    )  # fmt: skip
    return out


def check(name: str, n: int, k: int, density: float, arch: int = 800) -> None:
    """Every type and several stretches of rows, to the last bit."""
    packed = packed_of(name, n, k, density)
    assert packed.scales.dtype == torch.float16  # whose products with codes are exact
    for dtype in DTYPES:
        expected = sparse_formats.dequantize(packed, dtype)
        for row, rows in [(0, n), (n // 3, n - n // 3), (n - 1, 1), (n, 0)]:
            for aligned in (True, False):
                part = dequantize(packed, row, rows, dtype, arch, aligned)
                assert torch.equal(part, expected[row : row + rows])


@archs
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_specification(name, arch):
    for n, k, density in [(1, 1, 1.0), (17, 33, 0.0), (40, 300, 0.5)]:
        check(name, n, k, density, arch)


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_share_out_k(name):
    """Each begins where the bits before its stretch say."""
    check(name, 18, 2100, 0.3)


@pytest.mark.gpu_proof
@archs
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", FORMATS)
def test_every_shape(name, density, arch):
    for n, k in [(1, 1), (16, 32), (17, 33), (35, 130), (33, 2111), (5, 20000)]:
        check(name, n, k, density, arch)


@pytest.mark.parametrize("name", FORMATS)
def test_f32_scales(name):
    """Products that f32 rounds once, and f16 results beyond its range."""
    packed = packed_of(name, 20, 96)
    parts = packed.tensors()
    scales = parts["scales"].float() * (1 + 2.0**-23) * torch.logspace(-6, 4, parts["scales"].numel()).view_as(parts["scales"])
    packed = SparsePacked(packed.format, 20, 96, **parts | {"scales": scales})
    for dtype in DTYPES:
        assert torch.equal(dequantize(packed, 0, 20, dtype), sparse_formats.dequantize(packed, dtype))


@pytest.mark.parametrize("name", FORMATS[1:3])
def test_reads_and_writes_whole_sectors(name):
    packed = packed_of(name, 64, 512)
    for dtype in (torch.float16, torch.float32):
        counts = emulator().counts(lambda: dequantize(packed, 0, 64, dtype))
        assert counts.write_sectors == counts.distinct_written
        assert 32 * counts.distinct_read <= 1.03 * packed.nbytes + 4 * 32  # parts begin anywhere


def test_bad_input():
    packed = packed_of("unstructured/int4-g32", 20, 96)
    out = c_void_p(pointer(filled(21, 96, torch.float32)))

    def refused(match, row=0, rows=1, out=out, dtype=0, **changes):
        w = packed_struct(packed)
        for field, value in changes.items():
            setattr(w, field, value)
        with pytest.raises(RuntimeError, match=match):
            emulator().run("memlm_cuda_w4_sparse_dequantize", byref(w), c_int64(row), c_int64(rows), dtype, out)

    for row, rows in [(-1, 3), (0, 21), (18, 3), (2**62, 2**62)]:
        refused(f"rows: got {rows} from {row} on, W has 20", row=row, rows=rows)
    refused("dtype: got 3, accepted are 0 to 2", dtype=3)
    refused("out: NULL", out=None)
    refused("neither 2:4 nor unstructured", pattern=0)
    refused("starts: NULL", starts=None)
    refused("codes, scales or places are NULL", places=None)
    off = off_by_one(packed.codes)
    refused("must be 16-byte aligned", codes=pointer(off))
