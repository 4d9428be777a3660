"""dequantize and embedding on the emulated GPU: csrc/cuda/dequantize.cu, csrc/cuda/embedding.cu."""

from ctypes import byref, c_int64, c_void_p

import pytest
import torch

from memlm import formats

from .emulator import DTYPES, emulator, packed_struct, pointer
from .matmul_checks import off_by_one
from .test_dequantize import FORMATS, packed_of

archs = pytest.mark.parametrize("arch", [800, 750])


def filled(rows: int, k: int, dtype: torch.dtype, aligned: bool = True) -> torch.Tensor:
    out = torch.full((rows, k), float("inf"), dtype=dtype)  # which no test expects
    return out if aligned else off_by_one(out)


def dequantize(packed, row, rows, dtype, arch=800, aligned=True):
    out = filled(rows, packed.k, dtype, aligned)
    emulator(arch).run(
        "memlm_cuda_dequantize", byref(packed_struct(packed)), packed.format.bits, c_int64(row), c_int64(rows),
        DTYPES[dtype], c_void_p(pointer(out)), read=packed.tensors().values(), written=[out],
    )  # fmt: skip
    return out


def embedding(packed, ids, dtype):
    out = filled(len(ids), packed.k, dtype)
    emulator().run(
        "memlm_cuda_embedding", byref(packed_struct(packed)), packed.format.bits, c_void_p(pointer(ids)),
        c_int64(len(ids)), DTYPES[dtype], c_void_p(pointer(out)),
        read=[ids, *packed.tensors().values()], written=[out],
    )  # fmt: skip
    return out


@archs
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_specification(name, arch):
    """To the last bit."""
    for n, k in [(1, 1), (17, 33), (40, 300)]:
        for size in (1.0, 1e-6, 1e6):  # f16 results of the second are subnormal; the last has f32 scales
            packed = packed_of(name, n, k, size)
            for dtype in DTYPES:
                expected = formats.dequantize(packed, dtype)
                assert torch.equal(dequantize(packed, 0, n, dtype, arch), expected)
                part = dequantize(packed, n // 3, n - n // 3, dtype, arch, aligned=False)
                assert torch.equal(part, expected[n // 3 :])


@pytest.mark.parametrize("name", FORMATS)
def test_embedding(name):
    packed = packed_of(name, 50, 72)
    for ids in ([0, 49, 7, 7, 16, 15, 31, 32, 48, 1], [3], []):
        for dtype in DTYPES:
            rows = embedding(packed, torch.tensor(ids, dtype=torch.int64), dtype)
            assert torch.equal(rows, formats.dequantize(packed, dtype)[ids])


def test_ids_outside():
    """Nothing is read there, and their rows do not pass for numbers."""
    packed = packed_of("int4-g32", 50, 72)
    rows = embedding(packed, torch.tensor([1, -1, 50, 2**40, -(2**63)]), torch.float16)
    assert torch.equal(rows[0], formats.dequantize(packed, torch.float16)[1]) and rows[1:].isnan().all()


def test_reads_and_writes_whole_sectors():
    for name, dtype in (("int4-g32", torch.float16), ("int8-g64", torch.float32)):
        packed = packed_of(name, 64, 256)
        counts = emulator().counts(lambda: dequantize(packed, 0, 64, dtype))
        assert counts.write_sectors == counts.distinct_written
        codes = packed.codes.nbytes // 32
        assert counts.distinct_read <= codes + packed.scales.nbytes // 32 + 2  # not sector-aligned here


def test_bad_input():
    packed = packed_of("int4-g32", 20, 96)
    for row, rows in [(-1, 3), (0, 21), (18, 3), (2**62, 2**62)]:
        w, out = packed_struct(packed), c_void_p(pointer(filled(21, 96, torch.float32)))
        with pytest.raises(RuntimeError, match=f"rows: got {rows} from {row} on, W has 20"):
            emulator().run("memlm_cuda_dequantize", byref(w), 4, c_int64(row), c_int64(rows), 0, out)
    w = packed_struct(packed)
    with pytest.raises(RuntimeError, match="bits: got 3, accepted are 2, 4 and 8"):
        emulator().run("memlm_cuda_dequantize", byref(w), 3, c_int64(0), c_int64(1), 0, out)
    with pytest.raises(RuntimeError, match="ids: got -1 at"):
        emulator().run("memlm_cuda_embedding", byref(w), 4, None, c_int64(-1), 0, out)
