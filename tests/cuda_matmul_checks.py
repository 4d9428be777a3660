"""What the weight-only matmuls of csrc/cuda are tested for on the emulated GPU: the cases of the CPU's
tests, against f64."""

import pytest
import torch

from memlm.formats import Packed

from . import emulator, numerics
from .matmul_checks import around_cases, off_by_one, quantized, random_case

DTYPES = [torch.float16, torch.bfloat16]
# n, k: one of each, tails in both, several stages of k, k that blocks share out.
SHAPES = [(1, 1), (17, 33), (100, 300), (40, 2112)]
ROWS = [1, 7, 8, 13, 32, 70]  # each number of token tiles, tails
COMPLETE_SHAPES = [(16, 32), (5, 129), (33, 2111), (130, 4128)]
COMPLETE_ROWS = [2, 9, 16, 17, 31, 33, 64, 65, 129]


def in_range(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in dtype, with products that f16 can hold."""
    return (x / (8 * x.float().square().mean().sqrt())).to(dtype)


def check(op: str, format: str, n: int, k: int, m: int, dtype: torch.dtype, arch: int = 800) -> None:
    x, packed, bias = random_case(format, n, k, m, torch.float32)
    x, bias = in_range(x, dtype), bias.to(dtype)
    for b in (bias, None):
        y = emulator.matmul(op, x, packed, b, arch=arch)
        numerics.assert_within(y, *numerics.exact_matmul(x, packed, b, "mma"))


class WeightOnly:
    """``OP``: the operation; ``FORMATS`` that it takes."""

    OP: str
    FORMATS: list[str]

    def pytest_generate_tests(self, metafunc):
        values = {"format": self.FORMATS, "dtype": DTYPES}
        for name in metafunc.fixturenames:
            if name in values:
                metafunc.parametrize(name, values[name], ids=str)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_fp64(self, format, dtype, shape):
        for m in ROWS if shape == (17, 33) else ROWS[::3]:
            check(self.OP, format, *shape, m, dtype)

    @pytest.mark.gpu_proof
    @pytest.mark.parametrize("shape", SHAPES + COMPLETE_SHAPES, ids=str)
    def test_every_shape(self, format, dtype, shape):
        for m in ROWS + COMPLETE_ROWS:
            check(self.OP, format, *shape, m, dtype)

    def test_around(self, format, dtype):
        """Norm, swiglu and residual, each and together."""
        for x, packed, around in around_cases(format, 40, 96, 9, dtype):
            y = emulator.matmul(self.OP, x, packed, None, **around)
            numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))

    @pytest.mark.gpu_proof
    def test_around_many_rows(self, format, dtype):
        for x, packed, around in around_cases(format, 100, 1056, 41, dtype):
            y = emulator.matmul(self.OP, x, packed, None, **around)
            numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))

    def test_turing(self, format):
        for m in (1, 33):
            check(self.OP, format, 40, 300, m, torch.float16, arch=750)
        x, packed, _ = random_case(format, 16, 32, 1, torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype: got bf16 on compute capability 7.5; accepted are f16"):
            emulator.matmul(self.OP, x, packed, None, arch=750)

    def test_unaligned_rows(self, dtype):
        """x and y that 16 or 8 bytes at once would not fit, and strides."""
        x, packed, _ = random_case(self.FORMATS[0], 40, 96, 9, torch.float32)
        x = in_range(x, dtype)
        expected = emulator.matmul(self.OP, x, packed, None)
        assert torch.equal(emulator.matmul(self.OP, off_by_one(x), packed, None), expected)
        wide = torch.full((9, 104), float("nan"), dtype=dtype)
        wide[:, :96] = x
        assert torch.equal(emulator.matmul(self.OP, wide[:, :96], packed, None), expected)

    def test_not_finite(self, dtype):
        """What is not finite stays in its own row."""
        x, packed, _ = random_case(self.FORMATS[0], 20, 70, 9, torch.float32)
        x = in_range(x, dtype)
        clean = emulator.matmul(self.OP, x, packed, None)
        for value in (float("nan"), float("inf")):
            bad = x.clone()
            bad[1, 69] = value
            y = emulator.matmul(self.OP, bad, packed, None)
            others = [row for row in range(9) if row != 1]
            assert torch.equal(y[others], clean[others]) and not y[1].isfinite().all()

    def test_f32_scales(self, format):
        """Weights far outside f16's range keep f32 scales."""
        w = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * 1e6
        packed = quantized(w, format)
        assert packed.scales.dtype == torch.float32
        x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
        y = emulator.matmul(self.OP, x, packed, None)
        numerics.assert_within(y, *numerics.exact_matmul(x, packed, None, "mma"))

    def test_same_in_any_schedule(self):
        x, packed, bias = random_case(self.FORMATS[0], 40, 2112, 3, torch.float32)
        x, bias = in_range(x, torch.float16), bias.half()
        assert len({emulator.matmul(self.OP, x, packed, bias).numpy().tobytes() for _ in range(3)}) == 1

    def test_bad_input(self):
        x, packed, bias = random_case(self.FORMATS[0], 20, 96, 6, torch.float16)

        def refused(match, packed=packed, x=x, **changes):
            with pytest.raises(RuntimeError, match=match):
                emulator.matmul(self.OP, x, packed, None, **changes)

        refused(r"dtype: got f32 on compute capability \d+.\d", x=x.float())
        refused("swiglu: n / 2 must be a multiple of 16, n is 20", swiglu=True)
        parts = {name: off_by_one(t) for name, t in packed.tensors().items()}
        refused("must be 16-byte aligned", packed=Packed(packed.format, 20, 96, **parts))
