"""memlm.layers.SparseLinear: right results in every pattern, a well-behaved nn.Module, and
sparsify_, which puts it into models."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memlm
from memlm import QuantConfig, sparse_formats
from memlm.layers import Linear, Projections, SparseLinear, SwiGLU
from memlm.quantize import sparse_quantize

from .sparse import mask, prune_, random_weights
from .test_linear import error_bound, inputs

FORMATS = [
    "block/int4a-g32", "block/int8-g32", "block/f32", "block/bf16", "2:4/int4-g32", "2:4/nf4-g64",
    "unstructured/int4-g64",
]  # fmt: skip
FLOATS = ["block/f32", "block/bf16"]
formats = pytest.mark.parametrize("format", FORMATS)


def float_layer(format, n, k, density=0.5, seed=0, bias=True):
    layer = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(random_weights(memlm.SparseFormat.parse(format), n, k, density, seed) / 10)
    return layer


def layer_of(format, n=40, k=72, density=0.5, seed=0, mode=None):
    return SparseLinear.from_float(float_layer(format, n, k, density, seed), format, mode)


def mlp(format, *sizes):
    torch.manual_seed(0)
    return prune_(nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))), format)


@formats
@pytest.mark.parametrize("mode", ["accurate", "fast"])
def test_result(format, mode):
    for n, k, density, dtype in (
        (16, 64, 0.5, torch.float32), (33, 100, 0.5, torch.bfloat16), (130, 129, 0.1, torch.float16),
        (48, 96, 0.0, torch.float32), (1, 1, 1.0, torch.float32),
    ):  # fmt: skip
        source = float_layer(format, n, k, density).to(dtype)
        layer = SparseLinear.from_float(source, format, mode)
        weight = sparse_formats.dequantize(layer.packed, torch.float64)
        assert bool((weight[source.weight == 0] == 0).all()) or not layer.packed.format.symmetric
        rounds = mode == "fast" and format not in FLOATS
        for m in (1, 5):
            x = inputs(m, k, dtype=dtype)
            y = layer(x)
            expected = x.double() @ weight.T + source.bias.double()
            assert y.dtype == dtype and y.shape == (m, n)
            bound = error_bound(x, weight, y, "fast" if rounds else "accurate")
            if "nf4" in format and rounds:  # levels rounded to 1/127 of the largest, by half a step
                bound = bound + x.double().abs().sum(1, keepdim=True) * weight.abs().amax(1) / 254
            excess = (y.double() - expected).abs() - bound - torch.finfo(dtype).eps * expected.abs()
            assert excess.max() <= 0, (n, k, m)


@formats
def test_what_surrounds_the_product(format):
    layer = layer_of(format, 64, 96, mode="accurate")
    x, norm, residual = inputs(3, 96), inputs(96, seed=2), inputs(3, 32, seed=3)
    y = layer(x, norm, 1e-5, swiglu=True, residual=residual)
    gate, up = layer.to_float()(F.rms_norm(x, (96,), norm, 1e-5)).chunk(2, dim=-1)
    torch.testing.assert_close(y, F.silu(gate) * up + residual, rtol=1e-5, atol=1e-5)


@formats
def test_layers_in_one_call(format):
    layers = [float_layer(format, n, 72, seed=n) for n in (40, 24, 40)]
    x = inputs(3, 72)
    both = Projections.from_float(layers[:2], format, "accurate")
    assert type(both.linear) is SparseLinear
    gated = SwiGLU.from_float(layers[0], layers[2], format, "accurate")
    alone = [SparseLinear.from_float(layer, format, "accurate")(x) for layer in layers]
    for y, expected in zip(both(x), alone):
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gated(x), F.silu(alone[0]) * alone[2])


@formats
def test_topk(format):
    layer = layer_of(format, density=0.3)
    layer.bias.data.zero_()  # empty rows give equal elements
    x = inputs(4, 72)
    y = layer(x)
    values, indices = layer.topk(x, 9)
    for row in range(4):
        order = sorted(range(40), key=lambda i: (-y[row, i].item(), i))[:9]
        assert indices[row].tolist() == order and torch.equal(values[row], y[row, order])


@pytest.mark.parametrize("format", FLOATS)
def test_stored_floats_are_trained_and_zeros_stay(format):
    source = float_layer(format, 48, 96)
    layer = SparseLinear.from_float(source, format)
    assert [name for name, _ in layer.named_parameters()] == ["codes", "bias"]
    outside = layer.to_float().weight == 0
    x, target = inputs(64, 96), inputs(64, 48, seed=4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert bool(outside.any()) and bool((layer.to_float().weight[outside] == 0).all())
    layer.packed  # still what its format says


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in FLOATS])
def test_rounded_values_are_frozen(format):
    layer = layer_of(format, mode="accurate")
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    x, grad = inputs(5, 72).requires_grad_(), inputs(5, 40, seed=2)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.to_float().weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-5, atol=1e-6)


@formats
def test_a_module_like_any_other(format):
    layer, x = layer_of(format).eval(), inputs(5, 72)
    y, parts = layer(x), {n: t for n, t in layer.state_dict().items() if n != "bias"}
    assert set(parts) == set(layer.packed.tensors())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y) and not other.training
        assert other.codes.data_ptr() != layer.codes.data_ptr()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        before = {name: (t.dtype, t.data_ptr()) for name, t in parts.items()}
        layer.to(dtype)
        assert layer.weight.dtype == dtype and layer(x.to(dtype)).dtype == dtype
        now = {n: (t.dtype, t.data_ptr()) for n, t in layer.state_dict().items() if n != "bias"}
        assert now == before
    on_meta = copy.deepcopy(layer).to("meta")
    assert {t.device.type for t in on_meta.state_dict().values()} == {"meta"}
    assert on_meta.to_empty(device="cpu").codes.dtype == layer.codes.dtype
    assert f"format={format}" in repr(layer)
    assert torch.equal(layer.weight + 0, layer.to_float().weight)


def test_gradients_survive_casts():
    layer = layer_of("block/f32")
    layer(inputs(5, 72)).sum().backward()
    codes, grad = layer.codes, layer.codes.grad.clone()
    layer.bfloat16()
    assert layer.codes is codes and torch.equal(codes.grad, grad)
    assert layer.bias.grad.dtype == torch.bfloat16


@formats
def test_state_dict(format):
    layer, x, file = layer_of(format), inputs(5, 72), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.codes.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    for name, (change, message) in {
        "places": (lambda t: t.fill_(-1), "places: "),
        "starts": (lambda t: t.flip(0), "starts: "),
        "codes": (lambda t: t.double(), "codes: got torch.float64"),
    }.items():
        if name in state:
            with pytest.raises(RuntimeError, match=message):
                other.load_state_dict({**state, name: change(state[name].clone())})
    assert torch.equal(other(x), layer(x))  # refused before anything was copied


@pytest.mark.parametrize("format", ["block/int4a-g32", "block/f32", "2:4/int4", "unstructured/int4"])
def test_compiles_without_graph_breaks(format):
    first, second = layer_of(format, 48, 72), layer_of(format, 24, 48, mode="accurate")
    model = nn.Sequential(first, nn.GELU(), second)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, reference = inputs(5, 72).requires_grad_(), inputs(5, 72).requires_grad_()
    grads = []
    for module, given in ((compiled, x), (model, reference)):
        model.zero_grad()
        y = module(given)
        y.sum().backward()
        grads.append([y, given.grad, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*grads)


# --- sparsify_ -----------------------------------------------------------------------------------


@formats
def test_sparsify_and_back(format):
    model = mlp(format, 96, 64, 48)
    weights = [layer.weight.clone() for layer in model]
    assert memlm.sparsify_(model, format, strict=True) is model
    assert [type(layer) for layer in model] == [SparseLinear] * 2
    rows = memlm.explain(model).rows
    assert [row.format for row in rows] == [format] * 2 and rows[0].op == model[0].op
    assert all(0.3 < row.density < 0.7 for row in rows) and "% stored" in str(memlm.explain(model))
    assert rows[0].bytes == model[0].packed.nbytes + 64 * 4
    assert rows[0].float_bytes == (96 + 1) * 64 * 4
    memlm.dequantize_(model)
    for layer, weight in zip(model, weights):
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, sparse_formats.dequantize(sparse_quantize(weight, format)))


def test_layers_without_zeros_stay_and_say_why():
    for format, reason in {
        "block/int4": "no block of 16 rows and 32 k is zero",
        "2:4/int4": "more than two of 4 consecutive weights are not zero",
        "unstructured/int4": "no weight is zero",
    }.items():
        model = nn.Sequential(*mlp(format, 96, 64), *mlp(format, 64, 64))
        nn.init.ones_(model[1].weight)
        if format == "block/int4":
            model[1].weight.data[:, 3] = 0  # zeros, but no blocks
        with pytest.raises(ValueError, match=f"strict: 1 layers cannot be replaced: 1: {reason}"):
            memlm.sparsify_(model, format, strict=True)
        memlm.sparsify_(model, format)
        assert [type(layer) for layer in model] == [SparseLinear, nn.Linear]
        assert reason in memlm.explain(model).rows[1].reason
        memlm.quantize_(model, "int4")  # goes on with what is still float
        assert [type(layer) for layer in model] == [SparseLinear, Linear]
        assert model(inputs(2, 96)).shape == (2, 64)


def test_patterns_by_layer():
    model = nn.ModuleDict({
        "up": mlp("block/f32", 96, 64)[0], "down": mlp("2:4/int4", 64, 96)[0],
        "out": mlp("2:4/int4", 64, 32)[0], "embed": nn.Embedding(40, 64),
    })  # fmt: skip
    nn.init.ones_(model["embed"].weight)
    targets = {"down": "2:4/nf4", "out": "int8"}
    memlm.sparsify_(model, QuantConfig("block/int4", "int8", targets=targets), strict=True)
    names = {name: layer.format.name for name, layer in model.items()}
    assert names == {
        "up": "block/int4a-g32", "down": "2:4/nf4-g64", "out": "int8-g32", "embed": "int8-g32",
    }  # fmt: skip


def test_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    conv = pytorch_utils.Conv1D(24, 72)  # 24 out, 72 in
    kept = mask(memlm.SparseFormat.parse("2:4/int4"), 24, 72, 1.0)
    conv.weight.data = (random_weights(memlm.SparseFormat.parse("block/f32"), 24, 72, 1.0) * kept).T
    layer = SparseLinear.from_float(conv, "2:4/int4", "accurate")
    assert (layer.in_features, layer.out_features) == (72, 24) and layer.bias is conv.bias
    assert not layer.to_float().weight[~kept].any()


def test_refused():
    layer = float_layer("block/f32", 40, 72)
    for config, error, message in (
        ("block/int3", ValueError, "format: got 'int3'"),
        ("int4", ValueError, "format: got 'int4', accepted are PATTERN/VALUES"),
        (QuantConfig("int4"), ValueError, "config: has no sparse format"),
        (4, TypeError, "format: got int"),
    ):
        with pytest.raises(error, match=message):
            memlm.sparsify_(nn.Sequential(layer), config)
    with pytest.raises(ValueError, match="embedding: got block/int4a-g32, accepted .* are dense"):
        QuantConfig("block/int4", embedding="block/int4")
    with pytest.raises(ValueError, match="mode: got 'w8a8'"):
        QuantConfig("block/int8-g32", mode="w8a8")
    model = nn.ModuleDict({"embed": nn.Embedding(40, 64), "up": layer})
    config = QuantConfig("block/int4", targets={"embed": "2:4/int4"})
    with pytest.raises(ValueError, match="strict: 1 layers .* embed: config: 2:4/int4-g32"):
        memlm.sparsify_(model, config, strict=True)
    with pytest.raises(TypeError, match="linear: got Embedding"):
        SparseLinear.from_float(model["embed"], "block/int4")
    with pytest.raises(ValueError, match="mode: got 'w8a8', accepted for block/int8-g32"):
        SparseLinear.from_float(layer, "block/int8-g32", "w8a8")
    with torch.no_grad():
        layer.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="0: its weight contains NaN or Inf"):
        memlm.sparsify_(nn.Sequential(layer), "block/f32")
