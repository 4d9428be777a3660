"""What the weight-only matmuls of kernels/ are tested for in Triton's interpreter: the cases of the CPU's
tests, against f64."""

import itertools

import pytest
import torch

from . import numerics
from .cuda_matmul_checks import DTYPES, in_range
from .matmul_checks import SHAPES, arguments, around_cases, off_by_one, quantized, random_case
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.kernels._weight_only import SPACE  # noqa: E402

# n, k, rows: tails in each, more than one step of k.
FAST = [(1, 1, 1), (17, 33, 7), (100, 300, 17)]
ROWS = [1, 2, 7, 16, 33]


def matmul(op: str, x, packed, bias, config, **around) -> torch.Tensor:
    return kernels.implementation(op)(*arguments(x, packed, bias, False, **around), config=config)


def check(op: str, format: str, n: int, k: int, m: int, dtype: torch.dtype, configs) -> None:
    x, packed, bias = random_case(format, n, k, m, torch.float32)
    x, bias = in_range(x, dtype), bias.to(dtype)
    for config, b in zip(configs, itertools.cycle((bias, None))):
        y = matmul(op, x, packed, b, config)
        assert y.dtype == dtype and y.shape == (m, n)
        numerics.assert_within(y, *numerics.exact_matmul(x, packed, b, "mma"))


def split(space):
    """The first of these configurations whose programs share out k."""
    return next(config for config in space if config.kwargs["SPLITS"] > 1)


class WeightOnly:
    """``OP``: the operation; ``FORMATS`` that it takes; ``SPACE``: its configurations."""

    OP: str
    FORMATS: list[str]
    SPACE = SPACE

    def pytest_generate_tests(self, metafunc):
        values = {"format": self.FORMATS, "dtype": DTYPES, "config": self.SPACE}
        for name in metafunc.fixturenames:
            if name in values:
                metafunc.parametrize(name, values[name], ids=str)

    def test_against_fp64(self, format, dtype):
        for case in FAST:
            check(self.OP, format, *case, dtype, [self.SPACE[0], split(self.SPACE)])

    @pytest.mark.gpu_proof
    def test_every_shape_and_configuration(self, format, dtype, config):
        for n, k in SHAPES:
            for m in ROWS if k < 1000 else ROWS[-1:]:
                check(self.OP, format, n, k, m, dtype, [config, config])

    def test_around(self, format, dtype):
        """Norm, swiglu and residual, each and together."""
        for config in (self.SPACE[0], split(self.SPACE)):
            for x, packed, around in around_cases(format, 40, 96, 9, dtype):
                y = matmul(self.OP, x, packed, None, config, **around)
                numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))

    @pytest.mark.gpu_proof
    def test_around_in_every_configuration(self, format, dtype, config):
        for x, packed, around in around_cases(format, 100, 300, 41, dtype):
            y = matmul(self.OP, x, packed, None, config, **around)
            numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))

    def test_strides_and_shapes(self, dtype):
        x, packed, _ = random_case(self.FORMATS[0], 40, 96, 6, torch.float32)
        x = in_range(x, dtype)
        expected = matmul(self.OP, x, packed, None, self.SPACE[0])
        wide = torch.full((6, 104), float("nan"), dtype=dtype)
        wide[:, :96] = x
        for same in (off_by_one(x), wide[:, :96], x.T.contiguous().T):
            assert torch.equal(matmul(self.OP, same, packed, None, self.SPACE[0]), expected)
        assert torch.equal(matmul(self.OP, x.view(2, 3, 96), packed, None, self.SPACE[0]), expected.view(2, 3, 40))
        assert matmul(self.OP, x[:0], packed, None, self.SPACE[0]).shape == (0, 40)

    def test_not_finite(self, dtype):
        """What is not finite stays in its own row."""
        x, packed, _ = random_case(self.FORMATS[0], 20, 70, 9, torch.float32)
        x = in_range(x, dtype)
        clean = matmul(self.OP, x, packed, None, self.SPACE[0])
        for value in (float("nan"), float("inf")):
            bad = x.clone()
            bad[1, 69] = value
            y = matmul(self.OP, bad, packed, None, self.SPACE[0])
            others = [row for row in range(9) if row != 1]
            assert torch.equal(y[others], clean[others]) and not y[1].isfinite().all()

    def test_f32_scales(self, format):
        """Weights far outside f16's range keep f32 scales."""
        w = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 1e6
        packed = quantized(w, format)
        assert packed.scales.dtype == torch.float32
        x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
        y = matmul(self.OP, x, packed, None, self.SPACE[0])
        numerics.assert_within(y, *numerics.exact_matmul(x, packed, None, "mma"))

    def test_f32_is_refused(self):
        x, packed, _ = random_case(self.FORMATS[0], 20, 96, 6, torch.float32)
        with pytest.raises(TypeError, match="x: got torch.float32, Triton kernels take f16 and bf16"):
            matmul(self.OP, x, packed, None, self.SPACE[0])
