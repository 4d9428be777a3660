"""Layers of several projections in one call: Projections and SwiGLU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlm.layers import Linear, Projections, Stacked, SwiGLU


def layers(*widths, k=48, bias=True):
    torch.manual_seed(0)
    return [nn.Linear(k, n, bias=bias) for n in widths]


@pytest.mark.parametrize("format, mode", [("int8", "accurate"), ("int8-row", "w8a8"), ("int4", "fast")])
def test_projections_are_those_of_their_layers(format, mode):
    source = layers(40, 8, 13)
    source[1].bias = None
    made = Projections.from_float(source, format, mode)
    weights = made.linear.to_float().weight.detach().split([40, 8, 13])
    x, norm = torch.randn(2, 5, 48), torch.rand(48) + 0.5
    for given in ({}, {"norm": norm, "eps": 1e-5}):
        h = F.rms_norm(x, (48,), norm, 1e-5) if given else x
        for y, w, layer in zip(made(x, **given), weights, source):
            expected = F.linear(h, w, layer.bias)
            assert (y - expected).norm() < 0.02 * expected.norm()
    # What is packed is each layer's own weight: rows do not see each other.
    for w, layer in zip(weights, source):
        assert (w - layer.weight).norm() < 0.15 * layer.weight.norm()


@pytest.mark.parametrize("width", [16, 40, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_swiglu(width, bias):
    gate, up = layers(width, width, bias=bias)
    made = SwiGLU.from_float(gate, up, "int8", "accurate")
    whole, half = made.linear.to_float().requires_grad_(False), made.linear.out_features // 2
    x, norm = torch.randn(3, 48), torch.rand(48) + 0.5
    for given in ({}, {"norm": norm, "eps": 1e-5}):
        h = F.rms_norm(x, (48,), norm, 1e-5) if given else x
        parts = [whole(h)[:, start : start + width] for start in (0, half)]
        y = made(x, **given)
        assert y.shape == (3, width)
        torch.testing.assert_close(y, F.silu(parts[0]) * parts[1], rtol=1e-4, atol=1e-6)
    # What is packed are these two layers, and zeros below each.
    for layer, start in ((gate, 0), (up, half)):
        rows = whole.weight[start : start + width]
        assert (rows - layer.weight).norm() < 0.01 * layer.weight.norm()
        assert not whole.weight[start + width : start + half].any()


def test_swiglu_gradient():
    gate, up = layers(32, 32)
    made = SwiGLU.from_float(gate, up, "int8", "accurate")
    whole = made.linear.to_float()
    x = torch.randn(3, 48, requires_grad=True)
    made(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    g, u = F.linear(other, whole.weight.detach(), made.linear.bias.detach()).chunk(2, -1)
    (F.silu(g) * u).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="in_features"):
        Projections.from_float([nn.Linear(4, 4), nn.Linear(5, 4)], "int8")
    with pytest.raises(ValueError, match="layers: got none"):
        Projections.from_float([], "int8")
    with pytest.raises(ValueError, match="up: got weight"):
        SwiGLU.from_float(nn.Linear(4, 16), nn.Linear(4, 32), "int8")
    made = SwiGLU.from_float(nn.Linear(4, 16), nn.Linear(4, 16), "int8")
    with pytest.raises(ValueError, match="linear: got 32 rows, expected 64"):
        SwiGLU(made.linear, 20)
    with pytest.raises(ValueError, match="sizes"):
        Projections(made.linear, [1, 2])


def test_stacked():
    layers = [Linear.from_float(nn.Linear(64, n), f) for n, f in ((20, "int4"), (12, "int8"))]
    stacked, x = Stacked([*layers, nn.Linear(64, 5)]), torch.randn(2, 3, 64)
    assert stacked.out_features == 37
    parts = stacked(x).split([20, 12, 5], -1)
    assert all(torch.equal(part, layer(x)) for part, layer in zip(parts, stacked.layers))
