"""memlm.layers.Embedding."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memlm import formats
from memlm.layers import Embedding

FORMATS = ["int4", "int4a-g32", "int4-g128", "int8-row", "int8-g64"]


def float_embedding(n=50, k=72, dtype=torch.float32, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Embedding(n, k, **kwargs).to(dtype)


IDS = torch.tensor([[0, 49, 7], [16, 15, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_rows(format, dtype):
    for n, k in [(50, 72), (64, 128), (50, 1), (50, 33)]:
        source = float_embedding(n, k, dtype)
        layer = Embedding.from_float(source, format)
        rows = layer(IDS)
        assert rows.dtype == dtype and rows.shape == (2, 3, k)
        # one rounding to dtype, whatever the order of its f32 operations
        exact = formats.dequantize(layer.packed, torch.float64)[IDS]
        limit = (torch.finfo(dtype).eps + 2.0**-22) * exact.abs() + 1e-7
        assert ((rows.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("format, cosine", [("int8-row", 0.9999), ("int4-g32", 0.994), ("int4a-g32", 0.995)])
def test_close_to_the_float_layer(format, cosine):
    source = float_embedding(200, 256)
    rows = Embedding.from_float(source, format)(torch.arange(200))
    assert F.cosine_similarity(rows, source.weight, dim=1).min() > cosine - 0.003
    assert F.cosine_similarity(rows.flatten(), source.weight.flatten(), dim=0) > cosine


def test_kinds_of_ids():
    layer = Embedding.from_float(float_embedding(), "int8")
    assert torch.equal(layer(IDS.int()), layer(IDS))
    assert torch.equal(layer(IDS.T), layer(IDS).transpose(0, 1))
    assert layer(IDS[:0]).shape == (0, 3, 72)
    assert layer(torch.tensor(3)).shape == (72,)


@pytest.mark.parametrize("ids", [[50], [-1], [2**40]])
def test_ids_out_of_range(ids):
    layer = Embedding.from_float(float_embedding(), "int8")
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        layer(torch.tensor(ids))


def test_no_parameters_and_casts():
    layer = Embedding.from_float(float_embedding(), "int4a-g32")
    assert not list(layer.parameters())
    before = {name: (b.dtype, b.data_ptr()) for name, b in layer.named_buffers()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer(IDS).dtype == layer.weight.dtype == dtype
        assert {n: (b.dtype, b.data_ptr()) for n, b in layer.named_buffers()} == before


def test_copies_pickles_and_state_dict():
    layer = Embedding.from_float(float_embedding(dtype=torch.bfloat16), "int4")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(IDS), layer(IDS)) and other.dtype == torch.bfloat16
    other = Embedding.from_float(float_embedding(dtype=torch.bfloat16, seed=1), "int4")
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(IDS), layer(IDS))
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(Embedding.from_float(float_embedding(n=80), "int4").state_dict())


def test_compiles_without_graph_breaks():
    layer = Embedding.from_float(float_embedding(), "int4")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), layer(IDS))


def test_back_to_float():
    layer = Embedding.from_float(float_embedding(padding_idx=3), "int8").eval()
    back = layer.to_float()
    assert type(back) is nn.Embedding and back.padding_idx == 3 and not back.training
    assert torch.equal(back.weight, formats.dequantize(layer.packed)) and back.weight.requires_grad


def test_repr():
    assert repr(Embedding.from_float(float_embedding(padding_idx=0), "int8")) == (
        "Embedding(50, 72, padding_idx=0, format=int8-g32)"
    )


def test_bad_arguments():
    with pytest.raises(TypeError, match="embedding: got Linear"):
        Embedding.from_float(nn.Linear(3, 4), "int8")
    with pytest.raises(ValueError, match="max_norm"):
        Embedding.from_float(float_embedding(max_norm=1.0), "int8")
    with pytest.raises(TypeError, match="ids: got torch.float32"):
        Embedding.from_float(float_embedding(), "int8")(torch.zeros(3))
