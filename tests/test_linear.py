"""memlm.layers.Linear: right results in every format, and a well-behaved nn.Module."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlm import formats, quantize_weight
from memlm.layers import Linear, PackedWeight

FORMATS = ["int4", "int4-g64", "int4-g128", "int4a-g32", "int4a-g64", "int4a-g128", "int8-row",
           "int8-g32", "int8-g128"]  # fmt: skip
# n, k: one tile and many, tails in both, less than a group
SHAPES = [(16, 64), (48, 256), (33, 100), (1, 1), (5, 31), (130, 129)]


def float_layer(n, k, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return layer.to(dtype)


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error_bound(x, weight, y, mode):
    """What |y - x W^T| may be: rounding of sums and of the result, and, in fast mode, of x to 8
    bits with a scale per 32 k (half a step of amax / 127)."""
    x, weight = x.double(), weight.double()
    sums = x.abs() @ weight.abs().T
    # products and a sum of k terms in f32 (gamma_k, Higham 2002, 3.1), y stored in its own type
    bound = (x.shape[-1] + 8) * 2.0**-24 * sums + torch.finfo(y.dtype).eps * y.double().abs()
    if mode == "fast":
        padded = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
        step = (padded.abs().amax(-1, keepdim=True) / 127).expand_as(padded).flatten(-2)
        # 0.501: half a step, and the rounding of the scale itself
        bound = bound + 0.501 * step[..., : x.shape[-1]] @ weight.abs().T
    return bound + 1e-30


@pytest.mark.parametrize("mode", ["accurate", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_result(format, dtype, mode):
    for (n, k), bias in itertools.product(SHAPES, (True, False)):
        source = float_layer(n, k, bias, dtype)
        layer = Linear.from_float(source, format, mode)
        weight = formats.dequantize(layer.packed, torch.float64)
        for m in (1, 5):
            x = inputs(m, k, dtype=dtype)
            y = layer(x)
            expected = x.double() @ weight.T
            if bias:
                expected = expected + source.bias.double()
            assert y.dtype == dtype and y.shape == (m, n)
            extra = torch.finfo(dtype).eps * expected.abs()
            excess = (y.double() - expected).abs() - error_bound(x, weight, y, mode) - extra
            assert excess.max() <= 0, (n, k, m, bias)


@pytest.mark.parametrize("format, cosine", [("int8-row", 0.9999), ("int4-g32", 0.994), ("int4a-g32", 0.995)])
def test_close_to_the_float_layer(format, cosine):
    source = float_layer(256, 512)
    x = inputs(64, 512)
    y = Linear.from_float(source, format)(x)
    assert F.cosine_similarity(y.flatten(), source(x).flatten(), dim=0) > cosine


def test_leading_dimensions_strides_and_empty_batches():
    layer = Linear.from_float(float_layer(24, 40), "int8", "accurate")
    x = inputs(2, 3, 40)
    flat = layer(x.reshape(6, 40))
    assert torch.equal(layer(x), flat.view(2, 3, 24))
    torch.testing.assert_close(layer(x[0, 0]), flat[0])  # one row is summed in another order
    strided = inputs(40, 7).T
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    assert layer(x[:0]).shape == (0, 3, 24)


def test_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    conv = pytorch_utils.Conv1D(24, 40)  # 24 out, 40 in
    nn.init.normal_(conv.bias)
    layer = Linear.from_float(conv, "int8", "accurate")
    assert (layer.in_features, layer.out_features) == (40, 24) and layer.bias is conv.bias
    x = inputs(5, 40)
    with torch.no_grad():
        conv.weight.copy_(formats.dequantize(layer.packed).T)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["accurate", "fast"])
def test_gradients_reach_input_and_bias_and_nothing_else(mode):
    layer = Linear.from_float(float_layer(24, 40), "int4", mode)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    x = inputs(5, 40).requires_grad_()
    grad = inputs(5, 24, seed=2)
    layer(x).backward(grad)
    weight = formats.dequantize(layer.packed)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0), rtol=1e-5, atol=1e-6)


class LoRA(nn.Module):
    """y = base(x) + x A B, as in arXiv:2106.09685."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(inputs(base.in_features, rank, seed=3) * 0.1)
        self.b = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


def test_lora_trains_around_packed_layers():
    first, second = (Linear.from_float(float_layer(32, 32, seed=s), "int4") for s in (0, 1))
    model = nn.Sequential(LoRA(first), nn.ReLU(), LoRA(second))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x, target = inputs(64, 32), inputs(64, 32, seed=5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model[0].b.abs().max() > 0, "no gradient came through the second packed layer"
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())


def test_casts_keep_the_packed_tensors():
    layer = Linear.from_float(float_layer(24, 40), "int4a-g32")
    x = inputs(5, 40)
    before = {name: (buffer.dtype, buffer.data_ptr()) for name, buffer in layer.named_buffers()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.bias.dtype == dtype and layer.weight.dtype == dtype
        assert layer(x.to(dtype)).dtype == dtype
        now = {name: (buffer.dtype, buffer.data_ptr()) for name, buffer in layer.named_buffers()}
        assert now == before
    layer.half().bfloat16().float()
    assert {n: (b.dtype, b.data_ptr()) for n, b in layer.named_buffers()} == before
    layer.type(torch.float16)  # casts integers too
    assert {n: (b.dtype, b.data_ptr()) for n, b in layer.named_buffers()} == before


def test_f32_scales_survive_casts():
    source = float_layer(16, 32)
    source.weight.data *= 1e-6  # the scales are below f16's normal range
    layer = Linear.from_float(source, "int8")
    assert layer.scales.dtype == torch.float32
    scales = layer.scales.clone()
    assert torch.equal(layer.half().scales, scales)


def test_moving_to_another_device():
    layer = Linear.from_float(float_layer(24, 40), "int4").to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    empty = layer.to_empty(device="cpu")
    assert empty.scales.dtype == torch.float16 and empty.codes.device.type == "cpu"


def test_autocast():
    layer = Linear.from_float(float_layer(24, 40), "int4")
    x = inputs(5, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_copies_and_pickles():
    layer = Linear.from_float(float_layer(24, 40), "int4a-g64", "accurate").eval()
    x = inputs(5, 40)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert (other.format, other.mode, other.training) == (layer.format, "accurate", False)
        assert other.codes.data_ptr() != layer.codes.data_ptr()


def test_state_dict():
    layer = Linear.from_float(float_layer(24, 40, seed=0), "int4-g32")
    other = Linear.from_float(float_layer(24, 40, seed=1), "int4-g32")
    x = inputs(5, 40)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"codes", "scales", "bias"}
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "format, n, k",
    [("int4-g32", 25 + 16, 40), ("int4-g32", 24, 72), ("int4-g64", 24, 64), ("int4a-g32", 24, 40),
     ("int8-row", 24, 40)],
)  # fmt: skip
def test_state_dict_of_another_matrix_is_refused(format, n, k):
    layer = Linear.from_float(float_layer(24, 40), "int4-g32")
    before = layer.codes.clone()
    with pytest.raises(RuntimeError):
        layer.load_state_dict(Linear.from_float(float_layer(n, k), format).state_dict())
    if format == "int8-row":
        assert torch.equal(layer.codes, before)


def test_state_dict_of_another_dtype_is_refused():
    layer = Linear.from_float(float_layer(24, 40), "int4")
    state = layer.state_dict()
    state["scales"] = state["scales"].float()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="scales: got torch.float32, expected torch.float16"):
            layer.load_state_dict(state, strict=strict)


def test_weight_is_the_matrix_for_whoever_reads_it():
    source = float_layer(24, 40)
    layer = Linear.from_float(source, "int8")
    weight, dense = layer.weight, formats.dequantize(layer.packed)
    assert isinstance(weight, PackedWeight) and weight.shape == (24, 40)
    assert weight.dtype == torch.float32 and weight.device.type == "cpu"
    x = inputs(5, 40)
    assert torch.equal(F.linear(x, weight, layer.bias), F.linear(x, dense, layer.bias))
    assert torch.equal(weight[3:5].clone(), dense[3:5])
    assert torch.equal(layer.half().weight.float(), dense.half().float())
    assert "int8" in repr(weight)
    with pytest.raises(TypeError, match="packed and cannot be changed"):
        layer.weight.zero_()
    with pytest.raises(TypeError, match="packed and cannot be changed"):
        layer.weight.data += 1
    with pytest.raises(TypeError, match="packed and cannot be changed"):
        layer.weight.data = dense
    with pytest.raises(TypeError, match="weight: got Tensor"):
        layer.weight = dense


def test_assigning_a_weight_ties():
    first, second = (Linear.from_float(float_layer(24, 40, seed=s), "int4") for s in (0, 1))
    second.weight = first.weight
    assert second.codes is first.codes and second.scales is first.scales
    with pytest.raises(ValueError, match="weight: got .'int8-g32', 24, 40"):
        second.weight = Linear.from_float(float_layer(24, 40), "int8").weight


@pytest.mark.parametrize("format", ["int4a-g32", "int8"])
def test_compiles_without_graph_breaks(format):
    model = nn.Sequential(
        Linear.from_float(float_layer(48, 40), format),
        nn.GELU(),
        Linear.from_float(float_layer(24, 48), format, "accurate"),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, reference = inputs(5, 40).requires_grad_(), inputs(5, 40).requires_grad_()
    torch.testing.assert_close(compiled(x), model(reference))
    compiled(x).sum().backward()
    model(reference).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_back_to_float():
    layer = Linear.from_float(float_layer(24, 40), "int4").eval()
    layer.bias.requires_grad_(False)
    back = layer.to_float(torch.bfloat16)
    assert type(back) is nn.Linear and not back.training
    assert torch.equal(back.weight, formats.dequantize(layer.packed, torch.bfloat16))
    assert back.bias.dtype == torch.bfloat16 and not back.bias.requires_grad
    with pytest.raises(TypeError, match="dtype: got torch.float64"):
        layer.to_float(torch.float64)


def test_mode_can_be_changed():
    layer = Linear.from_float(float_layer(24, 256), "int4")
    x = inputs(5, 256)
    fast = layer(x)
    layer.mode = "accurate"
    assert layer.mode == "accurate" and not torch.equal(layer(x), fast)
    with pytest.raises(ValueError, match="mode: got 'quick'"):
        layer.mode = "quick"


def test_repr():
    layer = Linear.from_float(float_layer(24, 40, bias=False), "int4")
    assert repr(layer) == (
        "Linear(in_features=40, out_features=24, bias=False, format=int4a-g32, mode=fast)"
    )


def test_bad_arguments():
    source = float_layer(24, 40)
    with pytest.raises(ValueError, match="format: got 'int3'"):
        Linear.from_float(source, "int3")
    with pytest.raises(ValueError, match="mode: got 'slow'"):
        Linear.from_float(source, "int4", "slow")
    with pytest.raises(TypeError, match="linear: got Conv2d"):
        Linear.from_float(nn.Conv2d(3, 4, 1), "int4")
    with pytest.raises(ValueError, match=r"bias: got shape \[5\], expected \[24\]"):
        Linear.from_packed(quantize_weight(source.weight, "int4"), torch.zeros(5))
    layer = Linear.from_float(source, "int4")
    with pytest.raises(ValueError, match=r"x: got shape \[2, 41\], expected \[..., 40\]"):
        layer(torch.zeros(2, 41))
    with pytest.raises(TypeError, match="x: got torch.float64"):
        layer(torch.zeros(2, 40, dtype=torch.float64))
    with pytest.raises(TypeError, match="bias: got torch.float32, expected torch.float16"):
        layer(torch.zeros(2, 40, dtype=torch.float16))
    source.weight.data[3, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        Linear.from_float(source, "int4")


@pytest.mark.parametrize("mode", ["fast", "accurate"])
def test_order_of_columns(mode):
    """As the layer without order, given x in that order; `weight` has its columns where x has them."""
    packed = quantize_weight(float_layer(33, 100).weight, "int4")
    order = torch.randperm(100, generator=torch.manual_seed(3)).int()
    plain, ordered = Linear(packed, mode=mode), Linear(packed, mode=mode, order=order)
    x, norm = inputs(3, 100).requires_grad_(), inputs(100, seed=2)
    y = ordered(x)
    assert torch.equal(y, plain(x[:, order.long()]))
    assert torch.equal(ordered.weight.clone()[:, order.long()], plain.weight.clone())
    assert torch.equal(ordered.to_float().weight, ordered.weight.clone())
    expected = plain(F.rms_norm(x, (100,), norm, 1e-6)[:, order.long()])
    assert torch.equal(ordered(x, norm, 1e-6), expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, ordered.to_float().weight.sum(0).expand(3, -1))
    assert set(ordered.state_dict()) == {"codes", "scales", "offsets", "order"}
    assert ordered.half().order.dtype == torch.int32
    with pytest.raises(ValueError, match="order: got torch.int64"):
        Linear(packed, order=order.long())
