"""quantize_weight: every implementation gives the reference's bits."""

import numpy as np
import pytest
import torch

import memlm
from memlm import _rounding, formats, ops
from memlm.formats import Format
from memlm.ops import _matmul, implementations

FORMATS = [
    "int8-row", "int8-g32", "int8-g128", "int4-g32", "int4-g128", "int4a-g32", "int4a-g64",
    "nf4-g32", "nf4-g64", "int2-g32", "int2a-g32", "int2a-g128", "ternary-g64", "ternary-g128",
]  # fmt: skip
SHAPES = [(1, 1), (3, 20), (16, 128), (17, 33), (37, 300)]
PARTS = ("codes", "scales", "offsets")
F16, F32 = torch.float16, torch.float32


def normal(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def arguments(w, name, scale_dtype=F16):
    format = Format.parse(name)
    codebook = _matmul.codebook_index(format.codebook)
    return w, format.bits, codebook, format.group, not format.symmetric, scale_dtype


def bits(t: torch.Tensor) -> torch.Tensor:
    """Tells 0 from -0."""
    return t.view(torch.int16 if t.dtype == F16 else torch.int32) if t.is_floating_point() else t


def assert_same(got, expected, what=""):
    for name, one, other in zip(PARTS, got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(bits(one), bits(other)), (name, what)


def extremes(n, k):
    """(name, w, the scale dtypes that hold it)."""
    both = (F16, F32)
    w = normal(n, k)
    zero_group, constant, outlier, ties = w.clone(), w.clone(), w.clone(), (w * 8).round()
    zero_group[:, k // 3 : k // 3 + 40] = 0
    constant[:, : k // 2] = 0.37
    constant[0] = -5.5
    outlier[n // 2, k // 2] = 1000
    signs = torch.where(w > 0, 0.0, -0.0)
    signs[0, 0] = 1
    alternating = torch.tensor([3.4e38, -3.4e38]).repeat(n, k)[:, :k]
    mixed = w * 10.0 ** torch.arange(-44, 36, 80 / (n * k)).float()[: n * k].view(n, k)
    return [
        ("zeros", torch.zeros(n, k), both), ("-0.0", -torch.zeros(n, k), both),
        ("signs of zero", signs, both), ("groups of zeros", zero_group, both),
        ("constant groups", constant, both), ("one outlier", outlier, both), ("ties", ties, both),
        ("positive", w.abs() + 1, both), ("near f16's end", w.clamp(-1, 1) * 65504, both),
        ("subnormal", w * 1e-41, both), ("the smallest", torch.full((n, k), 1e-45), both),
        ("small", w * 1e-30, both), ("large", w * 1e37, (F32,)),
        ("the largest", alternating, (F32,)), ("all sizes", mixed, (F32,)),
    ]  # fmt: skip


@pytest.mark.parametrize("isa", memlm.isas())
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_reference(name, isa, restore_isa):
    memlm.set_isa(isa)
    for n, k in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for scale_dtype in (F16, F32):
                given = arguments((normal(n, k) * 0.03).to(dtype), name, scale_dtype)
                run = implementations("quantize_weight")
                assert_same(run["cpp"](*given), run["reference"](*given), (n, k, dtype))


@pytest.mark.parametrize("isa", memlm.isas())
@pytest.mark.parametrize("name", FORMATS)
def test_extremes(name, isa, restore_isa):
    memlm.set_isa(isa)
    run = implementations("quantize_weight")
    for what, w, scale_dtypes in extremes(18, 150):
        for scale_dtype in scale_dtypes:
            given = arguments(w, name, scale_dtype)
            assert_same(run["cpp"](*given), run["reference"](*given), what)


@pytest.mark.parametrize("name", FORMATS)
def test_numpy_gives_the_same_bits(name):
    format = Format.parse(name)
    for what, w, scale_dtypes in extremes(18, 150):
        for dtype in scale_dtypes:
            padded = np.empty((18, _rounding.columns(format, 150)), np.float32)
            padded[:, :150] = w.numpy()
            numpy_dtype = np.float16 if dtype == F16 else np.float32
            with np.errstate(all="ignore"):
                rows = _rounding.quantize_rows(np, padded, 150, format, numpy_dtype)
            parts = (None if part is None else torch.from_numpy(part) for part in rows)
            packed = formats.pack(*parts, format)
            expected = ops.quantize_weight(w, format, dtype)
            for part, tensor in expected.tensors().items():
                assert torch.equal(bits(getattr(packed, part)), bits(tensor)), (what, part)


@pytest.mark.parametrize("name", FORMATS)
def test_any_magnitude_is_rounded_as_well(name):
    """Powers of two that scale the weights scale the scales, and nothing else."""
    w = normal(20, 200)
    codes = ops.quantize_weight(w, Format.parse(name), F32).codes
    for exponent in (-100, -30, 30, 110):
        scaled = ops.quantize_weight(w * 2.0**exponent, Format.parse(name), F32)
        assert torch.equal(scaled.codes, codes)


def test_the_reference_in_chunks(monkeypatch):
    reference = implementations("quantize_weight")["reference"]
    given = arguments(normal(30, 100), "int4a-g32")
    whole = reference(*given)
    monkeypatch.setattr(_rounding, "_CHUNK", 700)
    assert_same(reference(*given), whole)


@pytest.mark.parametrize("name", ["int8-row", "int4a-g32", "ternary-g128"])
def test_rows_that_lie_apart_and_other_strides(name):
    w = normal(40, 300)
    for view in (w[3:, 5:205], w.T, w[::7], w[:1], w[0].expand(5, 300), w[:, ::2], w[:, 7:8]):
        assert_same(
            implementations("quantize_weight")["cpp"](*arguments(view, name)),
            implementations("quantize_weight")["cpp"](*arguments(view.clone(), name)),
        )


@pytest.mark.parametrize("name", ["int8-row", "int4a-g32", "nf4-g64", "int2-g32"])
def test_independent_of_threads(name, restore_threads):
    given, results = arguments(normal(70, 200), name), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(implementations("quantize_weight")["cpp"](*given))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("name", ["int8-row", "int4a-g32", "nf4-g64"])
def test_opcheck(name):
    op = torch.ops.memlm.quantize_weight.default
    torch.library.opcheck(op, arguments(normal(20, 96), name))


def test_chooses_the_scales_type_and_refuses_what_is_not_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert memlm.quantize_weight(normal(20, 96).to(dtype), "int4").scales.dtype == F16
        for bad in (float("nan"), float("inf"), -float("inf")):
            w = normal(20, 96).to(dtype)
            w[19, 95] = bad
            with pytest.raises(ValueError, match="w: contains NaN or Inf"):
                memlm.quantize_weight(w, "int4")


def test_what_is_not_finite_stays_where_it_is():
    """Past the check, it changes the codes of its own group of its own row only."""
    w = normal(20, 96)
    whole = formats.unpack(ops.quantize_weight(w, Format.parse("int4a-g32"), F16))[0]
    w[3, 40] = float("nan")
    other = formats.unpack(ops.quantize_weight(w, Format.parse("int4a-g32"), F16))[0]
    whole[3, 32:64] = other[3, 32:64]
    assert torch.equal(whole, other)


def test_bad_input():
    w, int4 = normal(20, 96), Format.parse("int4")
    for error, match, given in [
        (TypeError, "w: got torch.float64", (w.double(), int4, F16)),
        (TypeError, "w: got list", ([[1.0]], int4, F16)),
        (ValueError, r"w: got shape \[20\]", (w[:, 0], int4, F16)),
        (ValueError, r"w: got shape \[0, 96\]", (w[:0], int4, F16)),
        (TypeError, "scale_dtype: got torch.bfloat16", (w, int4, torch.bfloat16)),
    ]:
        with pytest.raises(error, match=match):
            ops.quantize_weight(*given)
    op = torch.ops.memlm.quantize_weight.default
    for match, given in [
        ("w: must be a matrix", (w[0], 4, 0, 32, False, F16)),
        ("w: accepted dtypes", (w.long(), 4, 0, 32, False, F16)),
        ("n, k: accepted", (w[:0], 4, 0, 32, False, F16)),
        ("bits: accepted are 2, 4, 8", (w, 3, 0, 32, False, F16)),
        ("group: accepted", (w, 4, 0, 0, False, F16)),
        ("group: accepted", (w, 4, 0, 48, False, F16)),
        ("codebook: accepted", (w, 8, 1, 32, False, F16)),
        ("codebook: accepted", (w, 4, 2, 32, False, F16)),
        ("offsets: 8-bit", (w, 8, 0, 32, True, F16)),
        ("levels: are for 4 bits without offsets", (w, 4, 1, 32, True, F16)),
        ("ternary: is for 2 bits without offsets", (w, 2, 2, 32, True, F16)),
        ("scale_dtype: got 2, accepted are f16, f32", (w, 4, 0, 32, False, torch.bfloat16)),
    ]:
        with pytest.raises(RuntimeError, match=match):
            op(*given)
