"""memlm.arrays: the same bits as the torch ops, without torch; whose memory it uses, and what it
refuses."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm import arrays, formats, ops
from memlm.models.load import hf_state

from . import numerics, tiny
from .producer import IS_COPIED, READ_ONLY, Producer
from .test_packaging import ROOT

FORMATS = [
    f"{kind}-g{group}"
    for kind in ("int8", "int4", "int4a", "nf4", "int2", "int2a", "ternary")
    for group in (32, 64, 128)
] + ["int8-row"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ONE_OF_EACH = ["int2a-g32", "int4-g32", "int4a-g64", "nf4-g64", "int8-row", "int8-g32"]
SHAPES = [(0, 16, 32), (1, 1, 1), (2, 17, 33), (3, 5, 129), (13, 100, 300), (31, 33, 2111)]
modes = pytest.mark.parametrize("mode", ["fast", "accurate"])

WITHOUT_TORCH = """
import sys
if "blocked" in sys.argv:
    sys.modules["torch"] = None
import numpy as np
from memlm import arrays
w, x = np.eye(50, 70, dtype="f4"), np.ones((3, 70), "f4")
for format in ("int4", "int4-g64", "int8", "int8-row"):
    packed = arrays.quantize(w, format)
    assert np.abs(arrays.matmul(x, packed) - 1).max() < 1e-3
    assert np.abs(arrays.dequantize(packed) - w).max() < 1e-3
    assert arrays.embedding(np.arange(3), packed).shape == (3, 70)
print(sys.modules.get("torch"), *arrays.load(sys.argv[1]))
"""


def random_parts(name: str, n: int, k: int, seed: int = 0) -> list:
    """Codes, scales, offsets or None, as torch tensors."""
    format, rng = memlm.Format.parse(name), np.random.default_rng(seed)
    q = rng.integers(format.codes[0], format.codes[-1] + 1, (n, k))
    scales, offsets = rng.standard_normal((2, n, format.groups(k))).astype(np.float16)
    parts = [q.astype(np.int8 if format.bits == 8 else np.uint8), scales, offsets]
    q, scales, offsets = map(torch.from_numpy, parts)
    return [q, scales, None if format.symmetric else offsets]


def case(format: str, m: int, n: int, k: int, dtype=torch.float32, seed: int = 0):
    """x, the packed torch matrix, and bias, norm, residual."""
    g = torch.Generator().manual_seed(seed)
    packed = formats.pack(*random_parts(format, n, k, seed), format)
    x, bias, norm, residual = (
        torch.randn(*shape, generator=g).to(dtype) for shape in ((m, k), (n,), (k,), (m, n))
    )
    return x, packed, {"bias": bias, "norm": norm, "residual": residual}


def as_numpy(packed: formats.Packed) -> arrays.Packed:
    parts = {name: tensor.numpy() for name, tensor in packed.tensors().items()}
    return arrays.Packed(packed.format, packed.n, packed.k, **parts)


def as_torch(packed: arrays.Packed) -> formats.Packed:
    offsets = None if packed.offsets is None else torch.from_numpy(packed.offsets)
    codes, scales = torch.from_numpy(packed.codes), torch.from_numpy(packed.scales)
    return formats.Packed(packed.format, packed.n, packed.k, codes, scales, offsets)


def same(result, expected: torch.Tensor) -> bool:
    return torch.equal(torch.from_numpy(result), expected)


def packed_model(folder):
    """The model that ``folder / "packed"`` then holds: packed layers, float norms, a tied head."""
    tiny.llama(folder / "float", tie_word_embeddings=True)
    model = memlm.load(folder / "float")
    memlm.quantize_(model, memlm.QuantConfig("int4", embedding="int8"))
    memlm.save(model, folder / "packed")
    return model


@pytest.mark.parametrize("blocked", ["", "blocked"])
def test_never_imports_torch(tmp_path, blocked):
    packed_model(tmp_path)
    run = [sys.executable, "-c", WITHOUT_TORCH, tmp_path / "packed", blocked]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None ") and "embed_tokens" in done.stdout


@pytest.mark.parametrize("name", FORMATS)
def test_packs_and_quantizes_as_torch(name):
    for n, k in ((1, 1), (17, 33), (40, 300)):
        parts = random_parts(name, n, k)
        expected = formats.pack(*parts, name)
        packed = arrays.pack(*(None if part is None else part.numpy() for part in parts), name)
        for part, tensor in expected.tensors().items():
            assert same(getattr(packed, part), tensor)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 300), st.integers(0, 99),
       st.sampled_from([1e-9, 1e-3, 1.0, 1e9]),
       st.sampled_from([np.float16, np.float32, np.float64]))  # fmt: skip
def test_quantizes_to_the_same_bits_as_torch(name, n, k, seed, size, dtype):
    w = np.random.default_rng(seed).standard_normal((n, k))
    w[:, : k // 4] = w[0, 0]  # constants, zeros, and ties
    w[:, k // 2 : k // 2 + 20] = 0
    with np.errstate(over="ignore"):
        w = np.nan_to_num((w * size).astype(dtype), posinf=1, neginf=1)
    packed, expected = arrays.quantize(w, name), memlm.quantize_weight(torch.from_numpy(w), name)
    for part, tensor in expected.tensors().items():
        assert same(getattr(packed, part), tensor)


def test_quantizes_where_rows_lie_apart_or_backwards():
    w = np.random.default_rng(0).standard_normal((40, 300)).astype(np.float32)
    for view in (w[3:, 5:205], w[:, ::-1], w.T, w[::-1], w[:1], np.broadcast_to(w[0], (5, 300))):
        packed, expected = arrays.quantize(view, "int4"), arrays.quantize(view.copy(), "int4")
        for part in ("codes", "scales", "offsets"):
            assert np.array_equal(getattr(packed, part), getattr(expected, part))


@modes
@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_as_the_torch_ops(format, mode):
    around = ({}, {"bias"}, {"norm"}, {"residual"}, {"bias", "norm", "residual"})
    for dtype in DTYPES:
        for m, n, k in SHAPES:
            x, packed, extra = case(format, m, n, k, dtype)
            for names in around:
                options = {name: extra[name] for name in names} | {"mode": mode, "eps": 1e-5}
                expected = ops.matmul(x, packed, **options)
                out = torch.empty_like(expected)
                assert arrays.matmul(x, packed, **options, out=out) is out
                assert torch.equal(out, expected)
                if dtype != torch.bfloat16:  # the same from numpy arrays, to a new one
                    options |= {name: extra[name].numpy() for name in names}
                    y = arrays.matmul(x.numpy(), as_numpy(packed), **options, threads=3)
                    assert same(y, expected)
                    assert y.flags.owndata is False and y.ctypes.data % 64 == 0


def test_default_modes_are_those_of_the_torch_ops():
    for format in ONE_OF_EACH:
        x, packed, _ = case(format, 3, 20, 70)
        assert same(arrays.matmul(x, packed), ops.matmul(x, packed))
        op = getattr(arrays, f"w{packed.format.bits}_matmul")
        assert same(op(x, packed), ops.matmul(x, packed))


@modes
@pytest.mark.parametrize("format", ONE_OF_EACH)
def test_swiglu(format, mode):
    for m in (1, 7):
        x, packed, extra = case(format, m, 96, 300)
        options = {"mode": mode, "swiglu": True, "bias": extra["bias"]}
        options["residual"] = extra["residual"][:, :48].contiguous()
        assert same(arrays.matmul(x, packed, **options), ops.matmul(x, packed, **options))
    with pytest.raises(ValueError, match="swiglu: W has 20 rows, accepted are multiples of 32"):
        arrays.matmul(*case(format, 1, 20, 64)[:2], swiglu=True)


@pytest.mark.parametrize("x_group", [0, 32])
@pytest.mark.parametrize("format", ["int8-row", "int8-g64"])
def test_w8a8(format, x_group):
    def torch_op(x, scales, packed, bias=None, **options):
        sizes = packed.codes, packed.scales, packed.n, packed.k, packed.format.group
        return ops.w8a8_matmul(x, scales, *sizes, bias, x_group, **options)

    for m, n, k in SHAPES:
        for dtype in DTYPES:
            x, packed, extra = case(format, m, n, k, dtype)
            norm = {"norm": extra["norm"], "eps": 1e-5}
            rest = {"bias": extra["bias"], "residual": extra["residual"]}
            q, scales = arrays.quantize_rows(x, x_group, **norm)
            expected = ops.quantize_rows(x, x_group, **norm)
            assert same(q, expected[0]) and same(scales, expected[1])
            y = torch.empty(m, n, dtype=dtype)
            arrays.w8a8_matmul(x, None, packed, x_group=x_group, **norm, **rest, out=y)
            assert torch.equal(y, torch_op(x, None, packed, **norm, **rest))
            name = str(dtype).removeprefix("torch.")
            arrays.w8a8_matmul(q, scales, packed, x_group=x_group, **rest, dtype=name, out=y)
            assert torch.equal(y, torch_op(*expected, packed, **rest, dtype=dtype))
        assert same(
            arrays.w8a8_matmul(q, scales, packed, x_group=x_group), torch_op(*expected, packed)
        )
    x, packed, extra = case("int8-row", 3, 20, 64)
    assert same(arrays.matmul(x, packed, mode="w8a8"), ops.matmul(x, packed, mode="w8a8"))


def test_w8a8_refuses():
    x, packed, extra = case("int8-row", 6, 20, 64)
    q, scales = arrays.quantize_rows(x)

    def refused(error, match, x=q, scales=scales, packed=packed, **options):
        with pytest.raises(error, match=match):
            arrays.w8a8_matmul(x, scales, packed, **options)

    refused(TypeError, "x: got float32, expected int8 beside x_scales", x=x)
    refused(TypeError, "x: got int8, accepted are float32", scales=None)
    refused(TypeError, "x_scales: got float64", scales=scales.astype(np.float64))
    refused(ValueError, r"x_scales: got shape \[6, 1\], expected \[6, 2\]", x_group=32)
    refused(ValueError, "x_scales: got strides", scales=np.zeros((6, 2), np.float32)[:, :1])
    refused(ValueError, "x_group: got 16, accepted are 0", x_group=16)
    refused(ValueError, "norm: got an array, but x is int8", norm=extra["norm"])
    refused(TypeError, "dtype: got float64, accepted are float32", dtype="float64")
    refused(
        TypeError,
        "dtype: got float16, the result has x's, float32",
        x=x,
        scales=None,
        dtype="float16",
    )
    refused(ValueError, "packed: got 4 bits, accepted are 8", packed=case("int4-g32", 6, 20, 64)[1])
    refused(ValueError, r"x: got shape \[6, 63\]", x=q[:, :63])
    refused(ValueError, r"x: got shape \[\]", x=np.int8(1)[...], scales=None)
    short = case("int8-row", 1, 4, 64)[1]
    memory = np.zeros((2, 4), np.float32)
    refused(ValueError, "out: shares memory with x_scales", x=q[:1], scales=memory[0, 3:, None], packed=short, out=memory[:1])  # fmt: skip
    for options, error, match in (
        ({"x": q}, TypeError, "x: got int8, accepted are float32"),
        ({"x": x[:, :0]}, ValueError, r"x: got shape \[6, 0\], expected \[..., k\]"),
        ({"x_group": 5}, ValueError, "x_group: got 5"),
        ({"norm": extra["bias"]}, ValueError, r"norm: got shape \[20\], expected \[64\]"),
        ({"norm": extra["norm"].half()}, TypeError, "norm: got float16, expected float32, as x"),
        ({"threads": 0}, ValueError, "threads: got 0"),
        ({"eps": None}, TypeError, "eps: got NoneType"),
    ):
        with pytest.raises(error, match=match):
            arrays.quantize_rows(**({"x": x} | options))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_w(format):
    for n, k in ((1, 1), (17, 33), (40, 300)):
        packed = case(format, 1, n, k)[1]
        ids = torch.randint(0, n, (2, 3), generator=torch.Generator().manual_seed(0))
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            w, rows = torch.empty(n, k, dtype=dtype), torch.empty(2, 3, k, dtype=dtype)
            arrays.dequantize(packed, name, out=w)
            arrays.embedding(ids, packed, name, out=rows)
            assert torch.equal(w, ops.dequantize(packed, dtype))
            assert torch.equal(rows, ops.embedding(ids, packed, dtype))
        assert same(
            arrays.dequantize(as_numpy(packed), np.float16), ops.dequantize(packed, torch.float16)
        )
        rows = ops.embedding(ids, packed)
        assert same(arrays.embedding(ids.numpy(), as_numpy(packed)), rows)
        assert same(arrays.embedding(ids.numpy().astype(np.int32), packed), rows)
        assert arrays.embedding(np.zeros((0, 4), np.int64), packed).shape == (0, 4, k)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([f for f in FORMATS if "nf" not in f]), st.sampled_from(memlm.isas()),
       st.booleans(), st.integers(1, 40), st.integers(1, 90), st.integers(1, 400), st.booleans(),
       st.integers(1, 4), st.integers(0, 999))  # fmt: skip
def test_any_shape_against_fp64(format, isa, fast, m, n, k, biased, threads, seed):
    rng = np.random.default_rng(seed)
    packed = arrays.quantize(rng.standard_normal((n, k)), format)
    x = rng.standard_normal((m, k), np.float32)
    bias = rng.standard_normal(n, np.float32) if biased else None
    before = memlm.isa()
    memlm.set_isa(isa)
    try:
        y = arrays.matmul(x, packed, bias, "fast" if fast else "accurate", threads=threads)
        arithmetic = numerics.arithmetic("cpp", m, fast)
    finally:
        memlm.set_isa(before)
    assert y.shape == (m, n)
    given = torch.from_numpy(x), as_torch(packed), torch.from_numpy(bias) if biased else None
    exact, bound = numerics.exact_matmul(*given, arithmetic)
    numerics.assert_within(torch.from_numpy(y), exact, bound)


def test_arrays_are_used_where_they_lie():
    """Offsets, distances between rows, more dimensions; what lies between stays as it was."""
    x, packed, extra = case("int4a-g32", 6, 20, 70)
    packed, bias = as_numpy(packed), extra["bias"].numpy()
    expected = arrays.matmul(x.numpy(), packed, bias)
    big_x, big_y = np.full((2, 3, 75), np.nan, np.float32), np.full((2, 3, 33), 7, np.float32)
    inner_x, inner_y = big_x[..., 3:73], big_y[..., 1:21]
    inner_x[:] = x.numpy().reshape(2, 3, 70)
    for lent in (inner_x, Producer(inner_x), Producer(inner_x, major=None)):
        inner_y[:] = np.nan
        assert arrays.matmul(lent, packed, bias, out=inner_y) is inner_y
        assert np.array_equal(inner_y.reshape(6, 20), expected)
        assert (big_y[..., :1] == 7).all() and (big_y[..., 21:] == 7).all()
    target = Producer(inner_y)
    inner_y[:] = np.nan
    assert arrays.matmul(inner_x, packed, bias, out=target) is target
    assert np.array_equal(inner_y.reshape(6, 20), expected)
    in_c_order = Producer(np.ascontiguousarray(x.numpy()), strides=False)
    assert np.array_equal(arrays.matmul(in_c_order, packed, bias), expected)
    one = arrays.matmul(inner_x[:1, 1:2], packed, bias)  # strides of single elements do not matter
    assert np.array_equal(one[0, 0], arrays.matmul(x.numpy()[1], packed, bias))
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    assert np.array_equal(arrays.matmul(read_only, packed, bias), expected)
    assert arrays.matmul(np.zeros((3, 0, 70), np.float32), packed).shape == (3, 0, 20)


@modes
def test_a_residual_is_updated_in_place(mode):
    for m in (1, 5, 40):
        x, packed, extra = case("int4-g32", m, 100, 2100)
        expected = ops.matmul(x, packed, mode=mode, residual=extra["residual"])
        y = extra["residual"].numpy()
        assert arrays.matmul(x, packed, mode=mode, residual=y, out=y) is y
        assert same(y, expected)


def test_refuses_what_it_cannot_read_in_place():
    x, packed, _ = case("int4a-g32", 6, 20, 64)
    x = x.numpy()
    accepted = arrays.matmul(x, packed)

    def refused(match, x=x, error=ValueError, **options):
        with pytest.raises(error, match=match):
            arrays.matmul(x, packed, **options)

    strided = r"got strides \[.*\] \(elements\) of shape \[.*\], accepted are contiguous rows"
    wide = np.zeros((6, 128), np.float32)
    refused("x: " + strided, np.asfortranarray(x))
    refused("x: " + strided, wide[:, ::2])
    refused("x: " + strided, wide[::-1, :64])
    refused("x: " + strided, np.broadcast_to(x[0], x.shape))
    refused("x: " + strided, Producer(np.asfortranarray(x)))
    refused("x: " + strided, np.zeros((2, 4, 3, 64), np.float32)[:, ::2])  # two steps between rows
    refused("x: the strides are not whole elements", np.zeros((6, 64), "f4,u1")["f0"])
    shifted = np.zeros(6 * 64 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(6, 64)
    refused("x: the elements are not aligned", shifted)
    refused("bias: got strides", bias=np.zeros(40, np.float32)[::2])
    refused("norm: got strides", norm=np.zeros(128, np.float32)[::2])
    refused("residual: got strides", residual=np.zeros((20, 6), np.float32).T)
    refused("out: got strides", out=np.zeros((20, 6), np.float32).T)
    refused("out: got strides", out=np.broadcast_to(np.zeros(20, np.float32), (6, 20)))

    frozen = np.zeros((6, 20), np.float32)
    frozen.flags.writeable = False
    for out in (frozen, Producer(frozen, flags=READ_ONLY), Producer(frozen, flags=IS_COPIED)):
        refused("out: is read-only", out=out)
    refused("out: is read-only", out=Producer(np.zeros((6, 20), np.float32), major=None))
    memory = np.zeros(6 * 64 + 119, np.float32)
    memory[: 6 * 64] = x.reshape(-1)
    refused("out: shares memory with x", memory[: 6 * 64].reshape(6, 64), out=memory[-120:].reshape(6, 20))  # fmt: skip
    y = np.zeros((7, 20), np.float32)
    refused("out: shares memory with residual", residual=y[1:], out=y[:-1])
    refused("out: shares memory with bias", bias=y[0], out=y[:6])
    scales = np.zeros((2, 2, 16), np.float32)
    inside = arrays.Packed(packed.format, 20, 64, packed.codes, scales, scales + 1)
    with pytest.raises(ValueError, match="out: shares memory with scales"):
        arrays.matmul(x[:1], inside, out=scales.reshape(-1)[:20].reshape(1, 20))
    assert same(accepted, ops.matmul(torch.from_numpy(x), packed))


@pytest.mark.parametrize("format", ["int4a-g32", "int8-row"])
def test_bad_input(format):
    x, packed, _ = case(format, 6, 20, 96)
    x, packed = x.numpy(), as_numpy(packed)
    ones = np.ones((6, 20), np.float32)

    def refused(error, match, x=x, packed=packed, **options):
        with pytest.raises(error, match=match):
            arrays.matmul(x, packed, **options)

    refused(
        TypeError, "x: got float64, accepted are float32, float16, bfloat16", x.astype(np.float64)
    )
    refused(TypeError, "x: got list, accepted are numpy arrays and what has __dlpack__", [1.0])
    refused(TypeError, "x: got an unknown dtype", x.astype(">f4"))
    refused(TypeError, "x: got an unknown dtype", Producer(x, lanes=2))
    refused(TypeError, "x: got complex64", x.astype(np.complex64))
    refused(ValueError, r"x: got shape \[6, 95\], expected \[..., 96\]", x[:, :95])
    refused(ValueError, r"x: got shape \[\]", np.float32(1)[...])
    refused(
        TypeError,
        "bias: got float16, expected float32, as x or the result",
        bias=np.ones(20, np.float16),
    )
    refused(ValueError, r"bias: got shape \[19\], expected \[20\]", bias=np.ones(19, np.float32))
    refused(TypeError, "norm: got float64, expected float32", norm=np.ones(96))
    refused(ValueError, r"norm: got shape \[95\]", norm=np.ones(95, np.float32))
    refused(TypeError, "residual: got float16", residual=ones.astype(np.float16))
    refused(ValueError, r"residual: got shape \[5, 20\]", residual=ones[:5])
    refused(
        TypeError, "out: got float16, expected float32, as the result", out=ones.astype(np.float16)
    )
    refused(ValueError, r"out: got shape \[5, 20\], expected \[6, 20\]", out=ones[:5].copy())
    refused(ValueError, "mode: got 'best'", mode="best")
    refused(ValueError, "threads: got 0", threads=0)
    refused(TypeError, "threads: got str", threads="2")
    refused(TypeError, "eps: got str", eps="0")
    refused(TypeError, "packed: got ndarray", packed=x)
    other = arrays.w8_matmul if packed.format.bits == 4 else arrays.w4_matmul
    with pytest.raises(ValueError, match="packed: got . bits"):
        other(x, packed)

    def malformed(match, **changes):
        parts = {"codes": packed.codes, "scales": packed.scales, "offsets": packed.offsets}
        fields = {"format": packed.format, "n": 20, "k": 96} | parts | changes
        with pytest.raises(memlm.FormatError, match=match):
            arrays.Packed(**fields)

    malformed("codes: got int32", codes=packed.codes.astype(np.int32))
    malformed("codes: got shape", codes=packed.codes[:1])
    malformed("codes: got strides", codes=np.asfortranarray(packed.codes))
    malformed("scales: got float64", scales=packed.scales.astype(np.float64))
    malformed("scales: got shape", scales=packed.scales[:1])
    malformed("scales: got list", scales=[1.0])
    malformed("offsets: got", offsets=packed.scales if packed.offsets is None else None)
    if packed.offsets is not None:
        malformed("offsets: got float32, expected float16, as scales", offsets=packed.offsets.astype("f4"))  # fmt: skip
        malformed("offsets: got shape", offsets=packed.offsets[:1])
    malformed("codes: got shape|scales: got shape", n=33)
    malformed("codes: got shape|scales: got shape", k=300)
    malformed(r"n, k: got \[0, 96\]", n=0)
    malformed("n, k: got '20', 96", n="20")

    for ids, error, match in (
        (np.array([0, 20]), ValueError, "ids: got 20 at position 1, accepted is 0 to 19"),
        (np.array([-1], np.int32), ValueError, "ids: got -1 at position 0"),
        (np.array([1.0]), TypeError, "ids: got float64, accepted are int64, int32"),
        (np.arange(10)[::2], ValueError, "ids: got strides"),
    ):
        with pytest.raises(error, match=match):
            arrays.embedding(ids, packed)
    for run in (lambda **o: arrays.dequantize(packed, **o), lambda **o: arrays.embedding(np.arange(20), packed, **o)):  # fmt: skip
        for dtype in ("float64", np.int8, object()):
            with pytest.raises(TypeError, match="dtype: got"):
                run(dtype=dtype)
        with pytest.raises(ValueError, match=r"out: got shape \[96, 20\], expected \[20, 96\]"):
            run(out=np.zeros((96, 20), np.float32))
        with pytest.raises(ValueError, match="out: got strides"):
            run(out=np.zeros((20, 97), np.float32)[:, :96])
        with pytest.raises(TypeError, match="out: got float32, expected float16"):
            run(dtype="float16", out=np.zeros((20, 96), np.float32))
        with pytest.raises(ValueError, match="threads: got 0"):
            run(threads=0)


def test_refuses_to_pack_and_quantize():
    w = np.ones((4, 64), np.float32)
    for bad, error, match in (
        (w * np.nan, ValueError, "w: contains NaN or Inf"),
        (w[:0], ValueError, r"w: got shape \[0, 64\]"),
        (w[0], ValueError, r"w: got shape \[64\]"),
        (w.astype(np.int64), TypeError, "w: got int64"),
        (w.astype(np.float64) * 1e300, ValueError, "w: contains NaN or Inf"),  # in f32
    ):
        with pytest.raises(error, match=match):
            arrays.quantize(bad, "int4")
    with pytest.raises(ValueError, match="format: got 'int3'"):
        arrays.quantize(w, "int3")
    with pytest.raises(ValueError, match="threads: got 0"):
        arrays.quantize(w, "int4", threads=0)
    q, scales = np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float16)
    for changes, error, match in (
        ({"q": q[0]}, ValueError, r"q: got shape \[64\]"),
        ({"q": q.astype(np.int8)}, TypeError, "q: got int8, expected uint8 for int4a-g32"),
        ({"q": q + np.uint8(16)}, ValueError, "q: got codes up to 16"),
        (
            {"q": q + np.uint8(3), "format": "ternary-g32", "offsets": None},
            ValueError,
            "q: got codes up to 3",
        ),
        ({"scales": scales[:, :1]}, ValueError, r"scales: got shape \[4, 1\], expected \[4, 2\]"),
        ({"scales": scales.astype(np.float64)}, TypeError, "scales: got float64"),
        ({"offsets": scales * np.nan}, ValueError, "offsets: contains NaN or Inf"),
        ({"offsets": scales.astype(np.float32)}, ValueError, "offsets: got float32"),
        ({"offsets": None}, ValueError, "offsets: got none"),
    ):
        with pytest.raises(error, match=match):
            arrays.pack(
                **({"q": q, "scales": scales, "offsets": scales, "format": "int4"} | changes)
            )


@pytest.mark.parametrize("major", [None, 1])
def test_each_borrowed_tensor_is_given_back_once(major):
    x, packed, extra = case("int4a-g32", 6, 20, 64)
    values = {"x": x, "codes": packed.codes, "scales": packed.scales, "offsets": packed.offsets}
    values |= extra
    lent = {name: Producer(tensor.numpy(), major) for name, tensor in values.items()}
    lent["out"] = Producer(np.zeros((6, 20), np.float32))
    given = arrays.Packed(packed.format, 20, 64, lent["codes"], lent["scales"], lent["offsets"])
    options = {name: lent[name] for name in ("bias", "norm", "residual", "out")}
    arrays.matmul(lent["x"], given, **options)
    assert torch.equal(torch.from_numpy(lent["out"].array), ops.matmul(x, packed, **extra))
    for name, producer in lent.items():  # the packed parts were also checked when put together
        assert producer.given == producer.deleted == (2 if name in packed.tensors() else 1), name
    with pytest.raises(ValueError, match="threads: got 0"):  # after all have been taken
        arrays.matmul(lent["x"], given, **options, threads=0)
    with pytest.raises(ValueError, match="x: got shape"):
        arrays.matmul(Producer(np.zeros((6, 63), np.float32), major), given, **options)
    for producer in lent.values():
        assert producer.given == producer.deleted


def test_producers_that_share_nothing():
    x, packed, _ = case("int8-row", 6, 20, 64)
    x = x.numpy()

    def refused(error, match, producer):
        with pytest.raises(error, match=match):
            arrays.matmul(producer, packed)
        if isinstance(producer, Producer):
            assert producer.given == producer.deleted

    refused(
        ValueError,
        "x: is on a device of DLPack's type 2, must be on the CPU",
        Producer(x, device=2),
    )
    refused(
        ValueError, "x: must be on the CPU", Producer(x, device_type=10)
    )  # one thing said, one given
    refused(ValueError, "x: DLPack version 2 is not known", Producer(x, major=2))
    refused(BufferError, "x: the array cannot be shared", torch.zeros(6, 64, requires_grad=True))

    class Used(Producer):
        def __dlpack__(self, **options):
            capsule = super().__dlpack__(**options)
            torch.from_dlpack(capsule)
            return capsule

    refused(TypeError, "x: __dlpack__ gave no unused DLPack capsule", Used(x))


def test_several_python_threads_at_once():
    cases = [case(format, 40, 60, 300, seed=seed) for seed, format in enumerate(ONE_OF_EACH)]
    expected = [ops.matmul(x, packed) for x, packed, _ in cases]
    wrong = []

    def work(i):
        x, packed, _ = cases[i]
        x, packed = x.numpy(), as_numpy(packed)
        wrong.extend(
            i for _ in range(50) if not same(arrays.matmul(x, packed, threads=2), expected[i])
        )

    threads = [threading.Thread(target=work, args=(i % len(cases),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_python_threads_run_meanwhile():
    """With no switch between Python threads but where the interpreter is left."""
    x, packed, _ = case("int8-row", 64, 512, 512)
    x, packed = x.numpy(), as_numpy(packed)
    go, ran = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (go.wait(), ran.set()))
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        go.set()
        for _ in range(200):
            arrays.matmul(x, packed)
            if ran.is_set():
                break
        assert ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        other.join()


def test_load_maps_a_packed_model(tmp_path):
    model, found = packed_model(tmp_path), arrays.load(tmp_path / "packed")
    tensors, specs, _ = hf_state(model)
    parts = {"codes": "weight", "scales": "scales", "offsets": "offsets"}
    packed = {f"{module}.{part}" for module in specs for part in parts.values()}
    assert found.keys() == specs.keys() | tensors.keys() - packed
    for name in tensors.keys() - packed:
        assert same(found[name].copy(), tensors[name])
    for name, spec in specs.items():
        for part, file in parts.items():
            array = getattr(found[name], part)
            if array is None:
                assert part == "offsets" and f"{name}.offsets" not in tensors
                continue
            tensor = tensors[f"{spec.get('tied_to', name)}.{file}"]
            assert same(array.copy(), tensor) and not array.flags.writeable
            while not isinstance(array, np.memmap):
                array = array.base
            assert array.filename == tmp_path / "packed" / "model.safetensors"
    x = np.ones((2, 64), np.float32)
    head = model.lm_head.packed
    assert same(arrays.matmul(x, found["lm_head"]), ops.matmul(torch.from_numpy(x), head))
    assert found["lm_head"].codes.ctypes.data == found["model.embed_tokens"].codes.ctypes.data


def test_load_refuses_malformed_files(tmp_path):
    packed_model(tmp_path)
    folder = tmp_path / "packed"
    config, weights = folder / "config.json", folder / "model.safetensors"
    text, data = config.read_text(), weights.read_bytes()

    def refused(match):
        with pytest.raises(memlm.FormatError, match=match):
            arrays.load(folder)
        config.write_text(text)
        weights.write_bytes(data)

    def change(**changes):
        settings = json.loads(text)
        settings["quantization_config"] |= changes
        config.write_text(json.dumps(settings))

    config.write_text("{}")
    refused("holds no packed memlm model")
    change(version=99)
    refused("version 99; known is 2")
    change(layers=[])
    refused("layers are malformed")
    change(layers={"layers.0": {"format": "int8", "n": 16, "k": 32}})
    refused("layers.0: codes: got NoneType")
    change(layers={"layers.0": {"format": "int3", "n": 16, "k": 32}})
    refused("layers are malformed.*int3")
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    name = next(key for key in header if key != "__metadata__")
    for field, value in (
        ("dtype", "F3"), ("shape", [2**40, 2**40]), ("shape", [-1, 1]), ("shape", 3),
        ("data_offsets", [0, 2**62]), ("data_offsets", [64, 0]), ("data_offsets", [0.0, 64]),
    ):  # fmt: skip
        broken = json.dumps(header | {name: header[name] | {field: value}}).encode()
        weights.write_bytes(len(broken).to_bytes(8, "little") + broken + data[size:])
        refused("not a valid safetensors file")
    for broken in (b"", data[:7], data[:100], data[: size + 10], b"\xff" * 8 + data[8:], data[:8] + b"[" * 99999 + b"]" * 9):  # fmt: skip
        weights.write_bytes(broken)
        refused("not a valid safetensors file")
    config.unlink()
    with pytest.raises(FileNotFoundError):
        arrays.load(folder)


def test_bfloat16_results_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    x, packed, _ = case("int4-g32", 3, 20, 64, torch.bfloat16)
    with pytest.raises(
        ImportError, match="out: a bfloat16 result needs the package ml_dtypes, or out"
    ):
        arrays.matmul(x, packed)


def test_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    jax = pytest.importorskip("jax", reason="jax is not installed")
    jnp = jax.numpy
    x, packed, extra = case("int4a-g32", 6, 20, 64)
    parts = {name: jnp.asarray(tensor.numpy()) for name, tensor in packed.tensors().items()}
    mine = arrays.Packed(packed.format, 20, 64, **parts)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        values = {key: jnp.asarray(value.numpy(), name) for key, value in extra.items()}
        given = jax.jit(lambda a: (a @ a.T @ a)[:3] / 64)(jnp.asarray(x.numpy(), name))
        y = arrays.matmul(given, mine)  # perhaps before JAX has computed it
        theirs = torch.from_numpy(np.asarray(given).astype(np.float32)).to(dtype)
        assert same(y.astype(np.float32), ops.matmul(theirs, packed).float())
        values["residual"] = values["residual"][:3]
        options = {key: value.to(dtype) for key, value in extra.items()}
        options["residual"] = options["residual"][:3]
        y = arrays.matmul(given, mine, **values)
        assert y.dtype == jnp.dtype(name)
        expected = ops.matmul(theirs, packed, **options)
        assert same(y.astype(np.float32), expected.float())
        if name != "bfloat16":  # numpy shares no bfloat16
            back = jnp.from_dlpack(y)
            assert back.dtype == name and back.unsafe_buffer_pointer() == y.ctypes.data
        else:
            back = jnp.asarray(y)
        assert np.array_equal(np.asarray(back), y)
    rows = arrays.embedding(jnp.arange(3), mine, jnp.bfloat16)
    assert same(
        rows.astype(np.float32), ops.embedding(torch.arange(3), packed, torch.bfloat16).float()
    )
    w = jnp.asarray(np.random.default_rng(0).standard_normal((20, 64)), jnp.bfloat16)
    again = memlm.quantize_weight(torch.from_numpy(np.asarray(w).astype(np.float32)), "int4")
    assert same(arrays.quantize(w, "int4").codes, again.codes)
    with pytest.raises(ValueError, match="out: is read-only"):
        arrays.matmul(x, packed, out=jnp.zeros((6, 20)))


def test_example():
    done = subprocess.run(
        [sys.executable, ROOT / "examples/numpy_matmul.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "numpy: largest error" in done.stdout and "torch imported: False" in done.stdout
