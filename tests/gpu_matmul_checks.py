"""What the weight-only matmuls are tested for on GPUs, in CUDA C++ and in Triton: the CPU tests' cases, against
f64."""

import torch

from memlm import sparse_formats
from memlm.quantize import sparse_quantize
from memlm.sparse_formats import SparseFormat

from . import numerics, sparse
from .matmul_checks import around_cases, off_by_one, quantized, random_case

DTYPES = [torch.float16, torch.bfloat16]
DENSITIES = [0.0, 0.1, 0.5, 1.0]


def in_range(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in dtype, with products that f16 can hold."""
    return (x / (8 * x.float().square().mean().sqrt())).to(dtype)


MANY = 129  # rows: those that are torch's product, with W unpacked


def check_many_rows(run, format: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """``run(x, packed, bias, **around)`` as csrc/torch/unpacked.h says, also with norm, swiglu and residual, each
    and together.  Returns the product with bias."""
    for x, packed, around in around_cases(format, n, k, MANY, dtype):
        y = run(x, packed, None, **around)
        assert y.dtype == dtype
        exact, bound = numerics.exact_unpacked(x, packed, None, **around)
        numerics.assert_within(y, exact, bound)
        # Zeros would be far outside; half of all gates are closed, and give next to nothing.
        assert (exact.abs() > bound).double().mean() > (0.3 if "swiglu" in around else 0.8)
    x, packed, bias = random_case(format, n, k, MANY, torch.float32)
    x, bias = in_range(x, dtype), bias.to(dtype)
    for b in (None, bias):
        y = run(x.view(3, MANY // 3, k), packed, b).view(MANY, n)
        numerics.assert_within(y, *numerics.exact_unpacked(x, packed, b))
    wide = torch.full((MANY, k + 7), float("nan"), dtype=dtype)
    wide[:, 3 : k + 3] = x
    assert torch.equal(run(wide[:, 3 : k + 3], packed, bias), y)
    return y


class GpuWeightOnly:
    """``OP``: the operation; ``FORMATS`` that it takes; ``run(x, packed, bias, **around)``: its product."""

    OP: str
    FORMATS: list[str]

    def pytest_generate_tests(self, metafunc):
        values = {"format": self.FORMATS, "dtype": DTYPES}
        for name in metafunc.fixturenames:
            if name in values:
                metafunc.parametrize(name, values[name], ids=str)

    def check(
        self, format: str, n: int, k: int, m: int, dtype: torch.dtype, biased=(True, False), **settings
    ) -> None:
        """``biased``: with bias, without."""
        x, packed, bias = random_case(format, n, k, m, torch.float32)
        x, bias = in_range(x, dtype), bias.to(dtype)
        for b in (bias if with_bias else None for with_bias in biased):
            y = self.run(x, packed, b, **settings)
            assert y.dtype == dtype and y.shape == (m, n)
            numerics.assert_within(y, *numerics.exact_matmul(x, packed, b, "mma"))

    def check_around(self, format: str, n: int, k: int, m: int, dtype: torch.dtype, **settings) -> None:
        """Norm, swiglu and residual, each and together."""
        for x, packed, around in around_cases(format, n, k, m, dtype):
            y = self.run(x, packed, None, **around, **settings)
            numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))

    def test_strides(self, dtype):
        """x and y that 16 or 8 bytes at once would not fit, and rows apart."""
        x, packed, _ = random_case(self.FORMATS[0], 40, 96, 9, torch.float32)
        x = in_range(x, dtype)
        expected = self.run(x, packed, None)
        wide = torch.full((9, 104), float("nan"), dtype=dtype)
        wide[:, :96] = x
        for same in (off_by_one(x), wide[:, :96]):
            assert torch.equal(self.run(same, packed, None), expected)

    def test_not_finite(self, dtype):
        """What is not finite stays in its own row."""
        x, packed, _ = random_case(self.FORMATS[0], 20, 70, 9, torch.float32)
        x = in_range(x, dtype)
        clean = self.run(x, packed, None)
        for value in (float("nan"), float("inf")):
            bad = x.clone()
            bad[1, 69] = value
            y = self.run(bad, packed, None)
            others = [row for row in range(9) if row != 1]
            assert torch.equal(y[others], clean[others]) and not y[1].isfinite().all()

    def test_f32_scales(self, format):
        """Weights far outside f16's range keep f32 scales."""
        w = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 1e6
        packed = quantized(w, format)
        assert packed.scales.dtype == torch.float32
        x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
        numerics.assert_within(self.run(x, packed, None), *numerics.exact_matmul(x, packed, None, "mma"))


class GpuSparse:
    """Of a sparse matmul, beside GpuWeightOnly.  ``SOME``: one format of each kind."""

    SOME: list[str]

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "some" in metafunc.fixturenames:
            metafunc.parametrize("some", self.SOME)

    def check_density(self, name: str, n: int, k: int, m: int, density: float, dtype: torch.dtype) -> None:
        """A share of the weights, next to none and all included; with one row of tiles without any."""
        format = SparseFormat.parse(name)
        w = sparse.random_weights(format, n, k, density)
        w[16:32] = 0
        packed = sparse_quantize(w, format)
        generator = torch.Generator().manual_seed(1)
        x = in_range(torch.randn(m, k, generator=generator), dtype)
        bias = torch.randn(n, generator=generator).to(dtype)
        y = self.run(x, packed, bias)
        numerics.assert_within(y, *numerics.exact_matmul(x, packed, bias, "mma"))
        assert torch.equal(y[:, 16:32], bias[16:32].expand_as(y[:, 16:32]))
        if density == 0:
            assert torch.equal(y, bias.expand_as(y))

    def check_not_finite(self, name: str, dtype: torch.dtype) -> None:
        """Of blocks: what is not finite stays in its own row, and in what is stored at its k."""
        x, packed, bias = random_case(name, 64, 70, 9, torch.float32)
        x, bias = in_range(x, dtype), bias.to(dtype)
        clean = self.run(x, packed, bias)
        tiles, places = sparse_formats.positions(packed)
        reached = torch.zeros(4, 16, dtype=torch.bool)
        reached[tiles[places == 2]] = True  # k 69
        reached = reached.flatten()
        assert reached.any() and not reached.all()
        others = [row for row in range(9) if row != 1]
        for value in (float("nan"), float("inf")):
            bad = x.clone()
            bad[1, 69] = value
            y = self.run(bad, packed, bias)
            assert torch.equal(y[others], clean[others])
            assert torch.equal(y[1, ~reached], clean[1, ~reached])
            assert not y[1, reached].isfinite().any()

    def test_f32_scales(self, some):
        """Weights far outside f16's range keep f32 scales."""
        packed = quantized(sparse.random_weights(SparseFormat.parse(some), 40, 96) * 1e6, some)
        assert packed.format.is_float or packed.scales.dtype == torch.float32
        x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
        numerics.assert_within(self.run(x, packed, None), *numerics.exact_matmul(x, packed, None, "mma"))
