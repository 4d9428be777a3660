"""w8a8_matmul in Triton's interpreter: exact integers, the CPU tests' cases."""

import itertools

import pytest
import torch

from memlm import formats

from .matmul_checks import DTYPES, random_case
from .test_w8a8_matmul import SHAPES, exact
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.kernels._weight_only import SPACE  # noqa: E402

SPLIT = next(config for config in SPACE if config.kwargs["SPLITS"] > 1)
ROWS = [0, 1, 7, 17, 33]


def run(x, x_scales, packed, bias, x_group, config, norm=None, eps=0.0, swiglu=False, residual=None, dtype=None):
    return kernels.implementation("w8a8_matmul")(
        x, x_scales, packed.codes, packed.scales, packed.n, packed.k, packed.format.group, bias,
        x_group, norm, eps, swiglu, residual, dtype, config=config,
    )  # fmt: skip


def check(format, x_group, shapes, rows, configs):
    """``configs(i)``: those for shape i."""
    for i, (n, k) in enumerate(shapes):
        dtype = DTYPES[i % 3]
        x, packed, bias = random_case(format, n, k, max(rows), dtype)
        if dtype == torch.float16:
            x = (x / x.float().square().mean().sqrt()).to(dtype)
        y, size = exact(x, packed, x_group)
        y, size = y + bias.double(), size + bias.double().abs()
        # Whole integer sums round 4 times; else each of k / 32 sums does.
        roundings = 4 if format == "int8-row" and x_group == 0 else 8 + k / 32
        bound = roundings * 2.0**-24 * size + torch.finfo(dtype).eps * y.abs() + 1e-6
        for config in configs(i):
            for m in rows:
                got = run(x[:m].contiguous(), None, packed, bias, x_group, config)
                assert got.dtype == dtype and got.shape == (m, n)
                assert ((got.double() - y[:m]).abs() <= bound[:m]).all()


@pytest.mark.parametrize("x_group", [0, 32])
@pytest.mark.parametrize("format", ["int8-row", "int8-g32", "int8-g128"])
def test_against_fp64(format, x_group):
    check(format, x_group, SHAPES[:4], [0, 1, 17], lambda i: [SPACE[0], SPLIT])


@pytest.mark.gpu_proof
@pytest.mark.parametrize("x_group", [0, 32])
@pytest.mark.parametrize("format", ["int8-row", "int8-g32", "int8-g64", "int8-g128"])
def test_every_shape(format, x_group):
    """Each in two of the configurations, which take turns."""
    turns = itertools.cycle(SPACE)
    check(format, x_group, SHAPES, ROWS, lambda i: [next(turns), next(turns)])


def check_whole_sums(k: int):
    """One rounding of an exact integer, at the extremes too."""
    random = torch.randint(-127, 128, (18, k), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    for w in (random, torch.full((18, k), -128, dtype=torch.int8)):
        packed = formats.pack(w, torch.ones(18, 1), None, "int8-row")
        for x in (random[:5], torch.full((5, k), 127, dtype=torch.int8)):
            for config in (SPACE[0], SPLIT):
                y = run(x, torch.ones(5, 1), packed, None, 0, config)
                assert torch.equal(y, (x.double() @ w.double().T).float())


def test_whole_sums_are_exact_integers():
    check_whole_sums(4128)


@pytest.mark.gpu_proof
def test_the_largest_sums_are_exact_integers():
    check_whole_sums(65536)


@pytest.mark.parametrize("config", [SPACE[0], SPLIT], ids=str)
@pytest.mark.parametrize("x_group", [0, 32])
def test_codes_and_numbers_give_the_same(x_group, config):
    quantize_rows = kernels.implementation("quantize_rows")
    for dtype in DTYPES:
        x, packed, bias = random_case("int8-row", 64, 100, 20, dtype)
        residual = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        norm = torch.rand(100, generator=torch.Generator().manual_seed(2)).to(dtype) + 1
        codes, scales = quantize_rows(x, x_group, norm, 1e-5)
        around = {"swiglu": True, "residual": residual}
        numbers = run(x, None, packed, bias, x_group, config, norm, 1e-5, **around)
        y = run(codes, scales, packed, bias, x_group, config, dtype=dtype, **around)
        assert torch.equal(y, numbers)
        rows = (codes.double() * scales.double().repeat_interleave(x_group or 100, dim=1)[:, :100])
        gate, up = (rows @ formats.dequantize(packed, torch.float64).T + bias.double()).chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up + residual.double()
        # One rounding to dtype; f32's of 100 products, whose sizes are some times the result's.
        torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_bad_input():
    x, packed, _ = random_case("int8-row", 32, 70, 6, torch.float32)
    with pytest.raises(ValueError, match="x_group: got 16"):
        run(x, None, packed, None, 16, SPACE[0])
    wide = formats.pack(torch.ones(1, 65537, dtype=torch.int8), torch.ones(1, 1), None, "int8-row")
    with pytest.raises(ValueError, match="k: got 65537"):
        run(torch.ones(1, 65537), None, wide, None, 0, SPACE[0])
