"""quantize_rows on the emulated GPU: csrc/cuda/quantize_rows.cu."""

import ctypes

import pytest
import torch

from memlm.ops._registry import implementations

from .emulator import DTYPES, emulator, pointer
from .matmul_checks import off_by_one

groups = pytest.mark.parametrize("x_group", [0, 32])
archs = pytest.mark.parametrize("arch", [800, 750])


def quantize_rows(x, x_group=0, norm=None, eps=0.0, arch=800):
    """Codes ``[..., k]`` and scales ``[..., groups]`` by the emulated kernel."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    codes = torch.full((len(rows), k), -128, dtype=torch.int8)
    scales = torch.full((len(rows), -(-k // 32) if x_group else 1), -1.0)
    emulator(arch).run(
        "memlm_cuda_quantize_rows", *map(ctypes.c_int64, (len(rows), k)), ctypes.c_void_p(pointer(rows)),
        ctypes.c_int64(rows.stride(0) if len(rows) > 1 else k), DTYPES[x.dtype],
        ctypes.c_void_p(pointer(norm)), ctypes.c_float(eps), ctypes.c_int64(x_group),
        ctypes.c_void_p(pointer(codes)), ctypes.c_void_p(pointer(scales)),
        read=[rows, norm], written=[codes, scales],
    )  # fmt: skip
    return codes.view(x.shape), scales.view(*x.shape[:-1], -1) if len(rows) else scales


@archs
@groups
def test_equals_the_specification(x_group, arch):
    """To the last bit, as the CPU's kernels."""
    reference = implementations("quantize_rows")["reference"]
    for shape in ((1, 1), (3, 33), (2, 5, 300), (2, 2111)):
        for dtype in DTYPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            codes, scales = quantize_rows(x, x_group, arch=arch)
            expected = reference(x, x_group, None, 0.0)
            assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    assert quantize_rows(torch.ones(0, 40), x_group)[0].shape == (0, 40)


@groups
def test_extremes(x_group):
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 0.0], [0.0, 0.0], [1e-45, 0.0], [3e38, -3e38]])
    codes, scales = quantize_rows(x, x_group)
    assert scales[:2].isnan().all() and not codes[:4].any()
    assert not scales[2:4].any() and codes[4].tolist() == [127, -127]
    wide = torch.zeros(1, 1000)
    wide[0, 700] = float("nan")  # in another thread than most
    codes, scales = quantize_rows(wide, x_group)
    assert scales.isnan().sum() == 1 and not codes.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@groups
def test_norm_before(x_group, dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 300, generator=generator).to(dtype)
    norm = (torch.rand(300, generator=generator) + 0.5).to(dtype)
    codes, scales = quantize_rows(x, x_group, norm, 1e-5)
    h = torch.nn.functional.rms_norm(x.double(), (300,), norm.double(), 1e-5)
    steps = scales.double().repeat_interleave(x_group or 300, dim=1)[:, :300]
    # Half a step; and a sum of 300 squares and five roundings, of numbers of up to 127 steps.
    assert ((codes.double() * steps - h).abs() <= (0.5 + 127 * (300 + 5) * 2.0**-24) * steps).all()
    padded = torch.zeros(5, 320, dtype=torch.float64)
    padded[:, :300] = h.abs()
    largest = padded.view(5, -1, 32).amax(-1) if x_group else h.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales.double() * 127, largest, rtol=(300 + 8) * 2.0**-24, atol=0)


@groups
def test_strides_and_alignment(x_group):
    x = torch.randn(4, 77, generator=torch.Generator().manual_seed(4)).half()
    expected = quantize_rows(x, x_group)
    wide = torch.full((4, 100), float("nan"), dtype=torch.float16)
    wide[:, 3:80] = x
    for other in (off_by_one(x), wide[:, 3:80]):
        assert all(torch.equal(a, b) for a, b in zip(quantize_rows(other, x_group), expected))


def test_bad_input():
    x = torch.ones(2, 33)
    with pytest.raises(RuntimeError, match="x_group: got 16, accepted are 0 and 32"):
        quantize_rows(x, 16)
    with pytest.raises(RuntimeError, match="x_stride: got 10, at least k = 33 is needed"):
        quantize_rows(torch.ones(50).as_strided((2, 33), (10, 1)))
