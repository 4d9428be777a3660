"""quantize_rows: the rounding that the specification says, to the last bit."""

import pytest
import torch

import memlm
from memlm import ops
from memlm.ops._registry import implementations

from .matmul_checks import DTYPES

groups = pytest.mark.parametrize("x_group", [0, 32])


@pytest.mark.parametrize("isa", memlm.isas())
@groups
def test_equals_the_specification(x_group, isa, restore_isa):
    memlm.set_isa(isa)
    reference = implementations("quantize_rows")["reference"]
    for shape in ((1, 1), (3, 33), (2, 5, 300), (0, 40)):
        for dtype in DTYPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            codes, scales = ops.quantize_rows(x, x_group)
            expected = reference(x, x_group, None, 0.0)
            assert codes.dtype == torch.int8 and scales.dtype == torch.float32
            assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])


@groups
def test_is_the_nearest_of_255_levels(x_group):
    """From the definition, element by element."""
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(2))
    codes, scales = ops.quantize_rows(x, x_group)
    for i in range(7):
        for start in range(0, 100, x_group or 100):
            span = x[i, start : start + (x_group or 100)].double()
            q = codes[i, start : start + len(span)].double()
            scale = scales[i, start // x_group if x_group else 0].double()
            assert q.abs().max() == 127
            torch.testing.assert_close(scale, span.abs().max() / 127, rtol=2**-23, atol=0)
            # Half a step, and the rounding of the scale (127 steps x 2^-23).
            assert ((q * scale - span).abs() <= (0.5 + 2**-16) * scale).all()


@groups
def test_extremes(x_group):
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 0.0], [0.0, 0.0], [1e-45, 0.0], [3e38, -3e38]])
    codes, scales = ops.quantize_rows(x, x_group)
    assert scales[:2].isnan().all() and not codes[:4].any()
    assert not scales[2:4].any() and codes[4].tolist() == [127, -127]


@pytest.mark.parametrize("isa", memlm.isas())
def test_norm_before(isa, restore_isa):
    memlm.set_isa(isa)
    x, norm = torch.randn(5, 300), torch.rand(300) + 0.5
    codes, scales = ops.quantize_rows(x, 32, norm, 1e-5)
    h = torch.nn.functional.rms_norm(x.double(), (300,), norm.double(), 1e-5)
    steps = scales.double().repeat_interleave(32, dim=1)[:, :300]
    # Half a step; and a sum of 300 squares and five roundings, of numbers of up to 127 steps.
    assert ((codes.double() * steps - h).abs() <= (0.5 + 127 * (300 + 5) * 2.0**-24) * steps).all()


def test_independent_of_threads(restore_threads):
    x, results = torch.randn(37, 500), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(ops.quantize_rows(x, 32))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_torch():
    torch.library.opcheck(torch.ops.memlm.quantize_rows.default, (torch.randn(3, 40), 32, None, 0.0))


def test_bad_input():
    x = torch.ones(2, 33)
    for error, match, arguments in [
        (TypeError, "x: got torch.int64", (x.long(),)),
        (TypeError, "x: got list", ([1.0],)),
        (ValueError, r"x: got shape \[\]", (torch.tensor(1.0),)),
        (ValueError, "x_group: got 16", (x, 16)),
        (ValueError, r"norm: got torch.float32 \[32\]", (x, 0, torch.ones(32))),
        (ValueError, "norm: got torch.float16", (x, 0, torch.ones(33).half())),
    ]:
        with pytest.raises(error, match=match):
            ops.quantize_rows(*arguments)
