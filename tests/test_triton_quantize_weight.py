"""quantize_weight in Triton's interpreter gives the reference's bits: kernels/quantize_weight.py."""

import pytest
import torch

from memlm.ops import implementations

from .matmul_checks import DTYPES, off_by_one
from .test_quantize_weight import F16, F32, FORMATS, SHAPES, arguments, assert_same, extremes, normal
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402

# 1 / 0, which a kernel computes where it takes something else.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")
LANES = 1024  # the interpreter's time is that of a program, whatever it has


def quantize(w, name: str, scale_dtype=F16, lanes: int = LANES) -> tuple:
    return kernels.implementation("quantize_weight")(*arguments(w, name, scale_dtype), lanes=lanes)


def check(w, name: str, scale_dtype, what, lanes: int = LANES) -> None:
    expected = implementations("quantize_weight")["reference"](*arguments(w, name, scale_dtype))
    assert_same(quantize(w, name, scale_dtype, lanes), expected, what)


FAST = ["int8-row", "int8-g32", "int4-g32", "int4a-g32", "nf4-g32", "ternary-g64"]


@pytest.mark.parametrize("name", FAST)
def test_equals_the_reference(name):
    scale_dtype = F16 if name in FAST[::2] else F32
    check((normal(17, 70) * 0.03).bfloat16(), name, scale_dtype, "bf16")


@pytest.mark.gpu_proof
@pytest.mark.parametrize("name", FORMATS)
def test_every_shape_and_type(name):
    for n, k in SHAPES:
        for dtype in DTYPES:
            for scale_dtype in (F16, F32):
                check((normal(n, k) * 0.03).to(dtype), name, scale_dtype, (n, k, dtype))


@pytest.mark.parametrize("name", ["int8-row", "int4a-g32"])
def test_extremes(name):
    for what, w, scale_dtypes in extremes(5, 70):
        if what in ("constant groups", "all sizes"):
            check(w, name, scale_dtypes[-1], what)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("name", FORMATS)
def test_every_extreme(name):
    for what, w, scale_dtypes in extremes(18, 150):
        for scale_dtype in scale_dtypes:
            check(w, name, scale_dtype, what)


@pytest.mark.parametrize("name", ["int8-row", pytest.param("int4-g32", marks=pytest.mark.gpu_proof)])
def test_programs_chunks_and_strides(name, monkeypatch):
    """Several of each, whose edges lie anywhere."""
    w = normal(40, 70)
    expected = quantize(w, name)
    assert_same(quantize(w, name, lanes=64), expected)
    for same in (w.T.contiguous().T, off_by_one(w)):
        assert_same(quantize(same, name), expected)
    monkeypatch.setattr("memlm.kernels.quantize_weight.CHUNK", 16 * 70)
    assert_same(quantize(w, name), expected)


def test_bad_input():
    w = normal(20, 96)
    with pytest.raises(TypeError, match="w: got torch.float64"):
        quantize(w.double(), "int4-g32")
    with pytest.raises(ValueError, match=r"w: got shape \[20\]"):
        quantize(w[:, 0], "int4-g32")
    with pytest.raises(TypeError, match="scale_dtype: got torch.bfloat16"):
        quantize(w, "int4-g32", torch.bfloat16)
