"""quantize_rows in Triton's interpreter: the rounding that the specification says, to the last bit."""

import pytest
import torch

from .matmul_checks import DTYPES
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.ops import implementations  # noqa: E402

quantize_rows = kernels.implementation("quantize_rows")
groups = pytest.mark.parametrize("x_group", [0, 32])


@groups
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_specification(x_group, dtype):
    reference = implementations("quantize_rows")["reference"]
    for shape in ((1, 1), (3, 33), (2, 5, 300), (2, 2100), (0, 40)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        codes, scales = quantize_rows(x, x_group, None, 0.0)
        expected = reference(x, x_group, None, 0.0)
        assert codes.dtype == torch.int8 and scales.dtype == torch.float32
        assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])


@groups
def test_extremes(x_group):
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 0.0], [0.0, 0.0], [1e-45, 0.0], [3e38, -3e38]])
    codes, scales = quantize_rows(x, x_group, None, 0.0)
    assert scales[:2].isnan().all() and not codes[:4].any()
    assert not scales[2:4].any() and codes[4].tolist() == [127, -127]


@pytest.mark.parametrize("x_group", [0, 32])
def test_norm_before(x_group):
    generator = torch.Generator().manual_seed(3)
    x, norm = torch.randn(5, 300, generator=generator), torch.rand(300, generator=generator) + 0.5
    codes, scales = quantize_rows(x, x_group, norm, 1e-5)
    h = torch.nn.functional.rms_norm(x.double(), (300,), norm.double(), 1e-5)
    steps = scales.double().repeat_interleave(x_group or 300, dim=1)[:, :300]
    # Half a step; and a sum of 300 squares and five roundings, of numbers of up to 127 steps.
    assert ((codes.double() * steps - h).abs() <= (0.5 + 127 * (300 + 5) * 2.0**-24) * steps).all()


def test_strides():
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(4))
    wide = torch.full((4, 80), float("nan"))
    wide[:, :70] = x
    for same in (wide[:, :70], x.T.contiguous().T):
        for a, b in zip(quantize_rows(same, 32, None, 0.0), quantize_rows(x, 32, None, 0.0)):
            assert torch.equal(a, b)


def test_bad_input():
    with pytest.raises(ValueError, match="x_group: got 16"):
        quantize_rows(torch.ones(2, 33), 16, None, 0.0)
