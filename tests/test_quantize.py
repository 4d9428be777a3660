"""quantize_weight: no worse than rounding to nearest, and what it refuses."""

import pytest
import torch

from memlm.formats import Format, dequantize, pack, unpack
from memlm.quantize import quantize_weight

FORMATS = ["int8-row", "int8-g32", "int4-g32", "int4-g128", "int4a-g32", "int4a-g64"]


def weights(n=48, k=200, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def round_to_nearest(w: torch.Tensor, format: Format) -> torch.Tensor:
    """The textbook rounding, group by group."""
    out = torch.empty_like(w)
    for start in range(0, w.shape[1], format.group or w.shape[1]):
        group = w[:, start : start + (format.group or w.shape[1])]
        if format.symmetric:
            s = group.abs().amax(1, keepdim=True) / (127 if format.bits == 8 else 7)
            out[:, start : start + group.shape[1]] = (group / s).round() * s
        else:
            low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
            s = (high - low) / 15
            out[:, start : start + group.shape[1]] = ((group - low) / s).round() * s + low
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_no_worse_than_round_to_nearest(name):
    format, w = Format.parse(name), weights()
    plain = (round_to_nearest(w, format) - w).norm()
    ours = (dequantize(quantize_weight(w, name)) - w).norm()
    # 8 bits are round-to-nearest, but for the scale's rounding to f16 (2^-11 of 127 steps).
    assert ours <= plain * (1.1 if format.bits == 8 else 0.97)


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_is_within_its_step(name):
    """Without clipping (8 bits) no weight moves by more than half a step; with it, the largest of
    a group may: by no more than what is cut off."""
    w = weights()
    packed = quantize_weight(w, name)
    scales = unpack(packed)[1].float().abs()
    step = scales.repeat_interleave(packed.format.group or 200, 1)[:, :200]
    error = (dequantize(packed) - w).abs()
    if packed.format.bits == 8:
        # Half a step, and at the group's end the scale's rounding: 127 steps x 2^-11.
        assert (error <= step * (0.5 + 127 / 2**11) + 1e-9).all()
    else:
        assert (error <= step * 0.5 * (1 + 1e-3) + 1e-7).float().mean() > 0.97
        assert (error <= 0.3 * w.abs().amax() + step).all()


@pytest.mark.parametrize("name", ["int4a-g32", "int4-g32"])
def test_recovers_an_exact_grid(name):
    """Weights that are already on such a grid come back as they are."""
    format = Format.parse(name)
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (32, 96), generator=g).to(torch.uint8)
    q[:, ::32], q[:, 1::32] = 0, 15  # both ends are used in every group
    scales = (torch.rand(32, 3, generator=g) + 0.5).half() / 64
    offsets = None if format.symmetric else -(torch.rand(32, 3, generator=g) / 8).half()
    w = dequantize(pack(q, scales, offsets, format))
    again = dequantize(quantize_weight(w, name))
    # The scale is found by least squares and rounded to f16: 15 steps of 2^-11 at most.
    assert (again - w).abs().max() <= 15 * scales.max() * 2**-10


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_constants(name):
    w = torch.zeros(20, 64)
    assert torch.equal(dequantize(quantize_weight(w, name)), w)
    w = torch.full((20, 64), 0.37)
    error = (dequantize(quantize_weight(w, name)) - w).abs().max()
    assert error <= 0.37 * 2**-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    w = weights().to(dtype)
    packed, same = quantize_weight(w, "int4-g32"), quantize_weight(w.float(), "int4-g32")
    assert torch.equal(packed.codes, same.codes)


def test_scale_dtype_follows_the_range():
    for size, dtype in ((1.0, torch.float16), (1e-9, torch.float32), (1e9, torch.float32)):
        for name in FORMATS:
            packed = quantize_weight(weights() * size, name)
            assert packed.scales.dtype == dtype
            error = (dequantize(packed) - weights() * size).norm()
            assert error < 0.15 * (weights() * size).norm()


def test_refusals():
    w = weights()
    for bad in (float("nan"), float("inf")):
        broken = w.clone()
        broken[3, 7] = bad
        with pytest.raises(ValueError, match="w: contains NaN or Inf"):
            quantize_weight(broken, "int4")
    with pytest.raises(ValueError, match=r"w: got shape \[0, 64\]"):
        quantize_weight(torch.zeros(0, 64), "int8-row")
    with pytest.raises(ValueError, match=r"w: got shape \[64\]"):
        quantize_weight(torch.zeros(64), "int8-row")
    with pytest.raises(TypeError, match="w: got torch.int64"):
        quantize_weight(torch.zeros(4, 64).long(), "int8-row")
    with pytest.raises(ValueError, match="format: got 'int3'"):
        quantize_weight(w, "int3")
