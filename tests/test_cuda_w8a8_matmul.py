"""w8a8_matmul on the emulated GPU: csrc/cuda/w8a8_matmul.cu."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from memlm import formats
from memlm.ops import _matmul

from . import emulator, numerics
from .matmul_checks import DTYPES, around_cases, off_by_one, quantized, random_case
from .test_cuda_quantize_rows import quantize_rows

FORMATS = ["int8-row", "int8-g32", "int8-g64", "int8-g128"]
groups = pytest.mark.parametrize("x_group", [0, 32])
each_format = pytest.mark.parametrize("format", FORMATS)
# n, k: one of each, tails in both, several stages of k, k that blocks share out.
SHAPES = [(1, 1), (17, 33), (100, 300), (40, 2112)]
ROWS = [1, 7, 8, 13, 32, 70]  # each number of token tiles, tails
COMPLETE_SHAPES = [(16, 32), (5, 129), (33, 2111), (600, 64)]
COMPLETE_ROWS = [2, 9, 16, 17, 31, 33, 64, 65, 129]
U = numerics.ROUNDOFF[torch.float32]


def run(x, x_scales, packed, bias, x_group, **more):
    after = (ctypes.c_void_p(emulator.pointer(x_scales)), ctypes.c_int64(x_group))
    return emulator.matmul("w8a8_matmul", x, packed, bias, after=after, read=[x_scales], **more)


def exact(q, scales, packed, x_group, bias=None, swiglu=False, residual=None, dtype=torch.float32):
    """In f64, of codes and scales of x, and the bound on a kernel's distance from it."""
    rows = q.double() * scales.double().repeat_interleave(x_group or packed.k, dim=1)[:, : packed.k]
    w = formats.dequantize(packed, torch.float64)
    y, size = rows @ w.T, rows.abs() @ w.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    # Whole integer sums round 4 times; else each of k / 32 sums is multiplied and added.
    whole = x_group == 0 and packed.format.group == 0
    bound = (4 if whole else 8 + packed.k / 32) * U * size
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        off_gate, off_up = bound.chunk(2, dim=-1)
        y = F.silu(gate) * up
        # silu's slope is below 1.1; exp and what follows it round a few times
        bound = 1.1 * off_gate * (up.abs() + off_up) + F.silu(gate).abs() * off_up + 8 * U * y.abs()
    if residual is not None:
        y = y + residual.double()
        bound = bound + U * (y.abs() + residual.double().abs())
    return y, bound + numerics.ROUNDOFF[dtype] * (y.abs() + bound) + numerics.SMALLEST[dtype]


def check(format, n, k, m, dtype, x_group, arch=800):
    x, packed, bias = random_case(format, n, k, m, torch.float32)
    x, bias = (x / (8 * x.square().mean().sqrt())).to(dtype), bias.to(dtype)
    q, scales = _matmul.quantize_activations(x.float(), x_group)
    q, scales = q.flatten(1)[:, :k].to(torch.int8), scales.flatten(1)
    for b in (bias, None):
        y = run(x, None, packed, b, x_group, arch=arch)
        assert y.dtype == dtype
        numerics.assert_within(y, *exact(q, scales, packed, x_group, b, dtype=dtype))
        again = run(q, scales, packed, b, x_group, dtype=dtype, arch=arch)
        assert torch.equal(y, again)


@each_format
@groups
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(format, x_group, shape):
    """Numbers, and codes that have been rounded before, which must give the same."""
    for i, m in enumerate(ROWS if shape == (17, 33) else ROWS[::3]):
        check(format, *shape, m, DTYPES[i % 3], x_group)


@pytest.mark.gpu_proof
@each_format
@groups
@pytest.mark.parametrize("shape", SHAPES + COMPLETE_SHAPES, ids=str)
def test_every_shape(format, x_group, shape):
    for m in ROWS + COMPLETE_ROWS:
        for dtype in DTYPES:
            check(format, *shape, m, dtype, x_group)


@each_format
@groups
def test_turing(format, x_group):
    for m in (1, 33):
        check(format, 40, 300, m, torch.bfloat16, x_group, arch=750)


def check_whole_sums(k, rows, arch):
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-127, 128, (max(rows), k), generator=generator).to(torch.int8)
    w18 = torch.randint(-128, 128, (18, k), generator=generator).to(torch.int8)
    for w in (w18, torch.full((18, k), -128, dtype=torch.int8)):
        packed = formats.pack(w, torch.ones(18, 1), None, "int8-row")
        for x in (random, torch.full((max(rows), k), -128, dtype=torch.int8)):
            sums = (x.double() @ w.double().T).float()
            for m in rows:
                y = run(x[:m], torch.ones(m, 1), packed, None, 0, dtype=torch.float32, arch=arch)
                assert torch.equal(y, sums[:m])


@pytest.mark.parametrize("arch", [800, 750])
def test_whole_sums_are_exact_integers(arch):
    """One scale per row on both sides: one rounding of an exact integer, at the extremes too."""
    for k in (96, 2064):
        check_whole_sums(k, (1, 7, 33), arch)


@pytest.mark.gpu_proof
def test_the_longest_sums_are_exact_integers():
    check_whole_sums(65536, (1, 33), 800)


@groups
@pytest.mark.parametrize("format", FORMATS[:2])
def test_around(format, x_group):
    """Norm, swiglu and residual, each and together, against f64 over the rounded rows."""
    for dtype in DTYPES:
        for x, packed, around in around_cases(format, 40, 96, 9, dtype):
            y = run(x, None, packed, None, x_group, **around)
            codes, scales = quantize_rows(x, x_group, around.pop("norm", None), around.pop("eps", 0.0))
            numerics.assert_within(y, *exact(codes, scales, packed, x_group, dtype=dtype, **around))
            again = run(codes, scales, packed, None, x_group, dtype=dtype, **around)
            assert torch.equal(y, again)


@groups
def test_f32_scales(x_group):
    """Weights far outside f16's range keep f32 scales."""
    for format in FORMATS[:2]:
        packed = quantized(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 1e6, format)
        assert packed.scales.dtype == torch.float32
        x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2))
        codes, scales = quantize_rows(x, x_group)
        numerics.assert_within(run(x, None, packed, None, x_group), *exact(codes, scales, packed, x_group))


@groups
def test_unaligned_rows(x_group):
    x, packed, bias = random_case("int8-g32", 40, 96, 9, torch.float32)
    codes, scales = quantize_rows(x, x_group)
    expected = run(codes, scales, packed, bias, x_group, dtype=torch.float32)
    wide = torch.full((9, 128), 99, dtype=torch.int8)
    wide[:, :96] = codes
    for other in (off_by_one(codes), wide[:, :96]):
        y = run(other, off_by_one(scales), packed, off_by_one(bias), x_group, dtype=torch.float32)
        assert torch.equal(y, expected)


@groups
def test_not_finite(x_group):
    """What is not finite stays in its own row."""
    x, packed, _ = random_case("int8-row", 20, 70, 9, torch.float32)
    clean = run(x, None, packed, None, x_group)
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[1, 69] = value
        y = run(bad, None, packed, None, x_group)
        others = [row for row in range(9) if row != 1]
        assert torch.equal(y[others], clean[others]) and y[1].isnan().all()


def test_same_in_any_schedule():
    x, packed, bias = random_case("int8-g32", 40, 2112, 3, torch.float32)
    assert len({run(x, None, packed, bias, 32).numpy().tobytes() for _ in range(3)}) == 1


def test_bad_input():
    x, packed, bias = random_case("int8-row", 20, 96, 6, torch.float32)
    codes, scales = quantize_rows(x)

    def refused(match, x=x, x_scales=None, packed=packed, x_group=0, **more):
        with pytest.raises(RuntimeError, match=match):
            run(x, x_scales, packed, None, x_group, **more)

    refused("x_group: got 16, accepted are 0 and 32", x_group=16)
    refused("norm: got one, but x is int8", codes, scales, norm=torch.ones(96), dtype=torch.float32)
    refused("swiglu: n / 2 must be a multiple of 16, n is 20", swiglu=True)
    wide = formats.pack(torch.ones(1, 65537, dtype=torch.int8), torch.ones(1, 1), None, "int8-row")
    refused("k: got 65537, at most 65536 are accepted", torch.ones(1, 65537), packed=wide)
