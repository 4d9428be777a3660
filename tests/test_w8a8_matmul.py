"""w8a8_matmul: exact integers, every implementation and instruction set."""

import pytest
import torch

import memlm
from memlm import formats, ops
from memlm.ops import _matmul
from memlm.ops._registry import implementations

from .matmul_checks import DTYPES, random_case
from .paths import PATHS, path_id

paths = pytest.mark.parametrize("path", PATHS, ids=path_id)
# n, k: one of each, tails in both, an odd number of 32 k, several stretches and blocks.
SHAPES = [(1, 1), (17, 33), (33, 96), (100, 300), (20, 2112), (600, 64)]
ROWS = [0, 1, 2, 5, 7, 12, 13, 17, 33]


def run(path, x, x_scales, packed, bias, x_group, norm=None, eps=0.0, swiglu=False, residual=None, dtype=None):
    implementation, isa = path
    if isa is not None:
        memlm.set_isa(isa)
    return implementations("w8a8_matmul")[implementation](
        x, x_scales, packed.codes, packed.scales, packed.n, packed.k, packed.format.group, bias,
        x_group, norm, eps, swiglu, residual, dtype,
    )  # fmt: skip


def exact(x, packed, group):
    """In f64, of the numbers that x is rounded to, and the sum of magnitudes."""
    q, scales = _matmul.quantize_activations(x.float(), group)
    rows = (q.double() * scales.double()).view(len(x), -1)[:, : packed.k]
    w = formats.dequantize(packed, torch.float64)
    return rows @ w.T, rows.abs() @ w.abs().T


@paths
@pytest.mark.parametrize("format", ["int8-row", "int8-g32"])
@pytest.mark.parametrize("x_group", [0, 32])
def test_against_fp64(path, format, x_group, restore_isa):
    for i, (n, k) in enumerate(SHAPES):
        dtype = DTYPES[i % 3]
        x, packed, bias = random_case(format, n, k, max(ROWS), dtype)
        y, size = exact(x, packed, x_group)
        y, size = y + bias.double(), size + bias.double().abs()
        # Whole integer sums round 4 times; else each of k / 32 sums does.
        roundings = 4 if format == "int8-row" and x_group == 0 else 8 + k / 32
        bound = roundings * 2.0**-24 * size + torch.finfo(dtype).eps * y.abs() + 1e-6
        for m in ROWS:
            got = run(path, x[:m].contiguous(), None, packed, bias, x_group)
            assert got.dtype == dtype and got.shape == (m, n)
            assert ((got.double() - y[:m]).abs() <= bound[:m]).all()


@paths
def test_whole_sums_are_exact_integers(path, restore_isa):
    """One scale per row on both sides: one rounding of an exact integer, at the extremes too."""
    generator = torch.Generator().manual_seed(0)
    for k in (96, 4128, 65536):
        random = torch.randint(-127, 128, (33, k), generator=generator).to(torch.int8)
        for w in (random[:18], torch.full((18, k), -128, dtype=torch.int8)):
            packed = formats.pack(w, torch.ones(18, 1), None, "int8-row")
            for x in (random, torch.full((33, k), 127, dtype=torch.int8)):
                sums = (x.double() @ w.double().T).float()
                for m in (1, 7, 33):
                    y = run(path, x[:m], torch.ones(m, 1), packed, None, 0)
                    assert torch.equal(y, sums[:m])


@paths
@pytest.mark.parametrize("x_group", [0, 32])
def test_codes_and_numbers_give_the_same(path, x_group, restore_isa):
    for dtype in DTYPES:
        x, packed, bias = random_case("int8-row", 64, 100, 20, dtype)
        residual = torch.randn(20, 32).to(dtype)
        norm = torch.rand(100).to(dtype) + 1
        if path[1]:
            memlm.set_isa(path[1])
        codes, scales = implementations("quantize_rows")[path[0]](x, x_group, norm, 1e-5)
        around = {"swiglu": True, "residual": residual}
        numbers = run(path, x, None, packed, bias, x_group, norm, 1e-5, **around)
        y = run(path, codes, scales, packed, bias, x_group, dtype=dtype, **around)
        torch.testing.assert_close(y, numbers, rtol=1e-2, atol=1e-3)
        if path[0] == "cpp":
            assert torch.equal(y, numbers)


def test_independent_of_threads(restore_threads):
    x, packed, bias = random_case("int8-row", 1100, 1000, 33, torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append([run(("cpp", None), x[:m], None, packed, bias, 0) for m in (1, 7, 33)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_torch():
    x, packed, bias = random_case("int8-row", 32, 70, 6, torch.float32)
    w = ops.dequantize(packed)
    op = torch.ops.memlm.w8a8_matmul.default
    arguments = (packed.codes, packed.scales, packed.n, packed.k, 0)
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(op, (leaf, None, *arguments, bias, 0, None, 0.0, False, None, None))
    codes, scales = ops.quantize_rows(x)
    torch.library.opcheck(op, (codes, scales, *arguments, None, 0, None, 0.0, False, None, None))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.matmul(x, packed, bias, "w8a8").dtype == torch.bfloat16
        y = ops.w8a8_matmul(codes, scales, *arguments, bias)
    assert torch.equal(y, ops.w8a8_matmul(codes, scales, *arguments, bias))  # in f32, as asked for
    seed = torch.randn(6, 32)
    ops.matmul(leaf, packed, bias, "w8a8").backward(seed)
    torch.testing.assert_close(leaf.grad, seed @ w)


def test_bad_input():
    x, packed, bias = random_case("int8-row", 32, 70, 6, torch.float32)
    parts = (packed.codes, packed.scales, 32, 70, 0)
    codes, scales = ops.quantize_rows(x)

    def refused(error, match, *arguments, **more):
        with pytest.raises(error, match=match):
            ops.w8a8_matmul(*arguments, **more)

    refused(ValueError, "x_group: got 16", x, None, *parts, x_group=16)
    refused(TypeError, "x: got torch.float32, expected torch.int8", x, scales, *parts)
    refused(ValueError, "x_scales: got", codes, scales[:, :0], *parts)
    refused(ValueError, "norm: got a tensor", codes, scales, *parts, norm=torch.ones(70))
    refused(TypeError, "dtype: got torch.bfloat16", x, None, *parts, dtype=torch.bfloat16)
    refused(TypeError, "bias: got torch.float16", x, None, *parts, bias.half())
    refused(RuntimeError, "x: holds -128 in row 1", codes.index_fill(0, torch.tensor(1), -128), scales, *parts)
    with pytest.raises(ValueError, match="mode: got 'w8a8'"):
        ops.matmul(x, memlm.quantize_weight(torch.ones(4, 70), "int4"), mode="w8a8")
    wide = formats.pack(torch.ones(1, 65537, dtype=torch.int8), torch.ones(1, 1), None, "int8-row")
    with pytest.raises(RuntimeError, match="k: got 65537"):
        ops.matmul(torch.ones(1, 65537), wide, mode="w8a8")
