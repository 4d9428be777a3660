"""quantize_weight on the emulated GPU: csrc/cuda/quantize_weight.cu gives the reference's bits."""

import ctypes
from ctypes import Structure, byref, c_int, c_int64, c_void_p

import pytest
import torch

from memlm import formats
from memlm.formats import Format
from memlm.ops import implementations

from .emulator import DTYPES, NF4, emulator, pointer
from .matmul_checks import off_by_one
from .test_quantize_weight import F16, F32, FORMATS, SHAPES, arguments, assert_same, extremes, normal

archs = pytest.mark.parametrize("arch", [800, 750])


class QuantizeArgs(Structure):
    """memlm_quantize_args"""

    _fields_ = [
        ("n", c_int64), ("k", c_int64), ("w", c_void_p), ("w_stride", c_int64), ("dtype", c_int), ("bits", c_int),
        ("ternary", c_int), ("group", c_int64), ("levels", c_void_p), ("scale_dtype", c_int), ("codes", c_void_p),
        ("scales", c_void_p), ("offsets", c_void_p), ("threads", c_int),
    ]  # fmt: skip


def poisoned(shape, dtype: torch.dtype) -> torch.Tensor:
    """What no test expects to stay."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


def quantize(w: torch.Tensor, name: str, scale_dtype=F16, arch: int = 800, changes=None) -> tuple:
    """As the torch op's result, of w with dense rows.  ``changes``: of the C function's arguments."""
    format = Format.parse(name)
    parts = {key: poisoned(*of) for key, of in formats.layout(format, *w.shape, scale_dtype).items()}
    args = QuantizeArgs(
        n=w.shape[0], k=w.shape[1], w=pointer(w), w_stride=w.stride(0), dtype=DTYPES[w.dtype], bits=format.bits,
        ternary=format.codebook == "ternary", group=format.group, scale_dtype=DTYPES[scale_dtype], threads=1,
        levels=ctypes.addressof(NF4) if format.codebook == "nf" else None,
        **{key: pointer(part) for key, part in parts.items()},
    )  # fmt: skip
    for key, value in (changes or {}).items():
        setattr(args, key, value)
    emulator(arch).run("memlm_cuda_quantize_weight", byref(args), read=[w], written=list(parts.values()))
    return parts["codes"], parts["scales"], parts.get("offsets", torch.empty(0, dtype=scale_dtype))


def reference(w: torch.Tensor, name: str, scale_dtype=F16) -> tuple:
    return implementations("quantize_weight")["reference"](*arguments(w, name, scale_dtype))


def check(name: str, n: int, k: int, dtype: torch.dtype, scale_dtype: torch.dtype, arch: int = 800) -> None:
    w = (normal(n, k) * 0.03).to(dtype)
    assert_same(quantize(w, name, scale_dtype, arch), reference(w, name, scale_dtype), (n, k, dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_reference(name):
    """Rows and k beyond the last tile and group, of each type of weights and scales."""
    types = [(F32, F16), (torch.bfloat16, F32), (torch.float16, F16)]
    for (n, k), (dtype, scale_dtype) in zip([(1, 1), (17, 33), (3, 300)], types):
        check(name, n, k, dtype, scale_dtype)


@pytest.mark.gpu_proof
@archs
@pytest.mark.parametrize("name", FORMATS)
def test_every_shape_and_type(name, arch):
    for n, k in [*SHAPES, (35, 1100)]:
        for dtype in DTYPES:
            for scale_dtype in (F16, F32):
                check(name, n, k, dtype, scale_dtype, arch)


@pytest.mark.parametrize("name", ["int8-row", "int8-g32", "int4-g32", "int4a-g64", "nf4-g32", "ternary-g64"])
def test_extremes(name):
    for what, w, scale_dtypes in extremes(5, 70):
        for scale_dtype in scale_dtypes[-1:]:
            assert_same(quantize(w, name, scale_dtype), reference(w, name, scale_dtype), what)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("name", FORMATS)
def test_every_extreme(name):
    for what, w, scale_dtypes in extremes(18, 150):
        for scale_dtype in scale_dtypes:
            assert_same(quantize(w, name, scale_dtype), reference(w, name, scale_dtype), what)


@pytest.mark.parametrize("name", ["int8-row", "int4a-g32", "nf4-g64"])
def test_rows_that_lie_apart_anywhere(name):
    w = normal(20, 100).half()
    for view in (w[3:, 5:75], w[::7], off_by_one(w)):
        assert_same(quantize(view, name), reference(view, name))


def test_turing():
    for name in ("int8-row", "int4a-g32", "nf4-g64"):
        check(name, 17, 70, torch.bfloat16, F16, arch=750)


def test_each_weight_is_read_once_from_memory_and_no_bank_waits():
    """But for the second pass over rows with one scale."""
    for name in ("int4a-g32", "nf4-g128"):
        w = normal(32, 512).half()
        counts = emulator().counts(lambda: quantize(w, name))
        assert 32 * counts.distinct_read <= w.nbytes + 64
        assert counts.write_sectors == counts.distinct_written
    w = normal(32, 512)
    counts = emulator().counts(lambda: quantize(w, "int4a-g32"))
    assert counts.shared_passes == counts.shared_least


def test_bad_input():
    w = normal(20, 96)

    def refused(match, name="int4-g32", **changes):
        with pytest.raises(RuntimeError, match=match):
            quantize(w, name, changes=changes)

    refused("bits: got 3, accepted are 2, 4 and 8", bits=3)
    refused("w: NULL", w=None)
    refused("codes or scales are NULL", codes=None)
    refused("got a group of 48, accepted are 32, 64, 128", group=48)
    refused("w_stride: got 95, at least k = 96 is needed", w_stride=95)
    refused("dtype: got 3, accepted are 0 to 2", dtype=3)
    refused("its scales must be f16 or f32", scale_dtype=2)
    refused("8-bit weights have no offsets", "int8-g32", offsets=w.data_ptr() // 16 * 16)
    refused("levels are for 4 bits without offsets", "int4a-g32", levels=ctypes.addressof(NF4))
    refused("ternary: is for 2 bits without offsets", "int2a-g32", ternary=1)
    falling = (ctypes.c_float * 16)(*NF4)
    falling[3] = falling[4]
    refused("levels: number 4 is -0.284441, after -0.284441; they must ascend", levels=ctypes.addressof(falling))
