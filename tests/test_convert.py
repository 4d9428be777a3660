"""quantize_ and dequantize_ on other people's models: what is replaced, what is left and why."""

import copy
import io
import pickle
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import memlm
from memlm import data
from memlm.layers import Embedding, Linear

from . import real, tiny

IDS = torch.arange(24).view(2, 12)
BOTH = memlm.QuantConfig("int4", "int8", "int8")


def kinds(model):
    return {name: type(m).__name__ for name, m in model.named_modules() if not list(m.children())}


def mlp(*sizes, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias) for a, b in zip(sizes, sizes[1:])))


def agreement(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


# --- Hugging Face --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_llama_keeps_its_ties(tmp_path, tied):
    model = tiny.llama(tmp_path, tie_word_embeddings=tied)
    expected = tiny.logits(model, IDS)
    assert memlm.quantize_(model, BOTH, strict=True) is model
    embedding, head = model.model.embed_tokens, model.lm_head
    assert type(embedding) is Embedding and type(head) is Linear
    assert (head.codes is embedding.codes) is tied
    assert all(isinstance(m, Linear) for n, m in model.named_modules() if n.endswith("_proj"))
    assert agreement(tiny.logits(model, IDS), expected) > 0.98
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)

    memlm.dequantize_(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert not any(type(m).__module__.startswith("memlm") for m in model.modules())
    assert agreement(tiny.logits(model, IDS), expected) > 0.98


def test_a_tied_head_stays_with_an_embedding_that_stays(tmp_path):
    model = tiny.llama(tmp_path, tie_word_embeddings=True)
    memlm.quantize_(model, memlm.QuantConfig("int4"), strict=True)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert memlm.explain(model).rows[-1].reason == "config: embedding=None"


def test_a_head_of_its_own_is_the_configs_to_decide(tmp_path):
    model = tiny.llama(tmp_path)
    memlm.quantize_(model, memlm.QuantConfig("int4", head="int8-row"))
    assert model.lm_head.format.name == "int8-row"
    assert model.model.layers[0].mlp.up_proj.format.name == "int4a-g32"
    assert type(model.model.embed_tokens) is nn.Embedding


def test_gpt2_conv1d():
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    expected = tiny.logits(model, IDS)
    memlm.quantize_(model, memlm.QuantConfig("int8", "int8"), strict=True)
    assert {"Conv1D", "Linear"} & set(kinds(model).values()) == {"Linear"}
    assert type(model.transformer.h[0].attn.c_attn) is Linear
    assert model.transformer.h[0].attn.c_attn.out_features == 3 * 64
    assert agreement(tiny.logits(model, IDS), expected) > 0.999


def test_bert():
    sizes = {k: v for k, v in tiny.SIZES.items() if k != "num_key_value_heads"}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**sizes)).eval()
    with torch.inference_mode():
        expected = model(IDS).last_hidden_state
        memlm.quantize_(model, memlm.QuantConfig("int8", "int8"), strict=True)
        result = model(IDS).last_hidden_state
    assert agreement(result, expected) > 0.999
    assert not {"Linear", "Embedding"} - set(kinds(model).values())
    assert not any(type(m) in (nn.Linear, nn.Embedding) for m in model.modules())


@pytest.mark.models
def test_smollm2_as_llama_for_causal_lm():
    model = real.smollm2_of_transformers()
    tokenizer = memlm.load(data.smollm2_gguf()).tokenizer
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    expected = tiny.logits(model, ids)
    memlm.quantize_(model, BOTH, strict=True)
    account = memlm.explain(model)
    assert account.bytes < 0.19 * account.float_bytes
    assert agreement(tiny.logits(model, ids), expected) > 0.999
    text = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0].tolist())
    assert text.startswith("The capital of France is Paris.")


@pytest.mark.models
def test_minilm_as_bert_model():
    model = AutoModel.from_pretrained(data.minilm()).eval()
    ids = torch.tensor([[101, 1037, 13156, 19082, 2098, 1012, 102]])
    with torch.inference_mode():
        expected = model(ids).last_hidden_state
        for format, least in (("int8", 0.9998), ("int4", 0.96)):
            quantised = memlm.quantize_(copy.deepcopy(model), format, strict=True)
            assert agreement(quantised(ids).last_hidden_state, expected) > least


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    original = copy.deepcopy(model)
    x, padding = torch.randn(3, 3, 32), torch.zeros(3, 3, dtype=torch.bool)
    padding[1, 2] = True
    memlm.quantize_(model, "int8")
    assert type(model.layers[1].linear1) is Linear
    assert type(model.layers[1].self_attn.out_proj) is not Linear
    reasons = {row.name: row.reason for row in memlm.explain(model).rows}
    assert "without calling it" in reasons["layers.0.self_attn.out_proj"]
    with torch.inference_mode():
        for mask in (None, padding):
            result, expected = (m(x, src_key_padding_mask=mask) for m in (model, original))
            seen = padding.logical_not() if batch_first else padding.logical_not().T
            assert agreement(result[seen], expected[seen]) > 0.999
        memlm.dequantize_(model)
        assert agreement(model(x), original(x)) > 0.999
    with pytest.raises(ValueError, match="strict: 2 layers cannot be replaced: layers.0.self_attn"):
        memlm.quantize_(original, "int8", strict=True)
    assert type(original.layers[0].linear1) is nn.Linear  # refused before anything was changed


def test_filter_and_formats():
    model = mlp(40, 48, 56)
    memlm.quantize_(model, "int4-g64", lambda module, name: name == "1")
    assert type(model[0]) is nn.Linear and model[1].format.name == "int4-g64"
    assert [row.reason for row in memlm.explain(model).rows] == ["filter_fn", ""]
    memlm.quantize_(model, "int8")  # goes on with what is still float
    assert model[0].format.name == "int8-g32" and model[1].format.name == "int4-g64"


def test_a_module_in_two_places_stays_one():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(32, 8))})
    memlm.quantize_(model, "int4")
    assert model["a"] is model["b"][0] and type(model["a"]) is Linear
    memlm.dequantize_(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear


def test_float_weights_go_as_packed_ones_come():
    """Never two full copies: when a layer is done, the float weights of those before are gone."""
    model = mlp(*[64] * 6)
    alive = [weakref.ref(layer.weight) for layer in model]
    seen = []
    memlm.quantize_(
        model, "int8", progress=lambda done, total, name: seen.append(
            (done, total, name, sum(ref() is not None for ref in alive)))
    )  # fmt: skip
    assert [s[:3] for s in seen] == [(i + 1, 5, str(i)) for i in range(5)]
    assert [s[3] for s in seen] == [4, 3, 2, 1, 0]


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def with_hook():
    layer = nn.Linear(32, 32)
    layer.register_forward_hook(lambda module, args, output: output)
    return layer


LEFT = {
    "forward of its own": (lambda: Odd(32, 32), "Odd has a forward of its own"),
    "hook": (with_hook, "has hooks"),
    "dtype": (lambda: nn.Linear(32, 32).double(), "its weight is torch.float64"),
    "meta": (lambda: nn.Linear(32, 32, device="meta"), "meta device"),
    "no rows": (lambda: nn.Linear(32, 0), r"shape \[0, 32\]"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), "parametrised"),
    "max_norm": (lambda: nn.Embedding(8, 32, max_norm=1.0), "max_norm rewrites"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("make, reason", LEFT.values(), ids=LEFT)
def test_layers_that_cannot_be_replaced_say_why(make, reason):
    model = nn.ModuleList([make(), nn.Linear(32, 32)])
    config = memlm.QuantConfig("int8", "int8", "int8")
    with pytest.raises(ValueError, match=f"strict: 1 layers cannot be replaced: 0: .*{reason}"):
        memlm.quantize_(copy.deepcopy(model), config, strict=True)
    first = model[0]
    memlm.quantize_(model, config)
    assert model[0] is first and type(model[1]) is Linear
    assert re.search(reason, memlm.explain(model).rows[0].reason)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_changes(value):
    model = mlp(32, 32, 32)
    with torch.no_grad():
        model[1].weight[3, 5] = value
    with pytest.raises(ValueError, match="1: its weight contains NaN or Inf"):
        memlm.quantize_(model, "int4")
    assert type(model[0]) is nn.Linear


def test_bad_arguments():
    model = mlp(32, 32)
    for bad, error, message in (
        ({"config": "int3"}, ValueError, "format: got 'int3'"),
        ({"config": "int4-g48"}, ValueError, "group: got 48"),
        ({"config": 4}, TypeError, "config: got int"),
        ({"filter_fn": "all"}, TypeError, "filter_fn: got str"),
    ):
        with pytest.raises(error, match=message):
            memlm.quantize_(model, **bad)
    with pytest.raises(ValueError, match="embedding: format: got 'fp4'"):
        memlm.QuantConfig(embedding="fp4")
    with pytest.raises(ValueError, match="mode: got 'exact'"):
        memlm.QuantConfig(mode="exact")
    with pytest.raises(ValueError, match="model: is itself a Linear"):
        memlm.quantize_(model[0])
    with pytest.raises(TypeError, match="model: got str"):
        memlm.quantize_("model")
    with pytest.raises(TypeError, match="dtype: got torch.int8"):
        memlm.dequantize_(model, torch.int8)
    assert type(model[0]) is nn.Linear


# --- a converted model as a module ---------------------------------------------------------------


def test_copies_casts_and_files(tmp_path):
    model = tiny.llama(tmp_path, tie_word_embeddings=True)
    memlm.quantize_(model, BOTH)
    expected = tiny.logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.logits(other, IDS), expected)
        assert other.lm_head.codes is other.model.embed_tokens.codes
        assert other.lm_head.codes is not model.lm_head.codes
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.lm_head.codes.dtype == torch.int8 and half.lm_head.scales.dtype == torch.float16
    assert half.lm_head.codes is half.model.embed_tokens.codes
    assert tiny.logits(half, IDS).dtype == torch.bfloat16
    assert agreement(tiny.logits(half, IDS), expected) > 0.995

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = tiny.llama(tmp_path / "again", tie_word_embeddings=True)
    memlm.quantize_(fresh, BOTH)
    with torch.no_grad():
        fresh.model.norm.weight.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(tiny.logits(fresh, IDS), expected)


def test_train_and_eval():
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5)).train()
    memlm.quantize_(model, "int8")
    assert model[0].training and not model.eval()[0].training


def test_specs_rebuild_the_layers():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 32), "head": nn.Linear(32, 50, bias=False),
                           "out": nn.Linear(50, 7)})  # fmt: skip
    model["head"].weight = model["embed"].weight
    fresh = copy.deepcopy(model)
    memlm.quantize_(model, memlm.QuantConfig("int4-g64", "int8", "int8", mode="accurate"))
    specs = memlm.layer_specs(model)
    assert specs["head"]["tied_to"] == "embed" and specs["out"]["mode"] == "accurate"
    memlm.build_layers_(fresh, specs)
    assert fresh["out"].codes.is_meta and fresh["head"].codes is fresh["embed"].codes
    fresh.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 50)
    assert torch.equal(fresh["out"](x), model["out"](x))
    for edit in (
        {"format": "int5"}, {"n": 8}, {"type": "Embedding"}, {"bias": False}, {"mode": 1},
        {"scale_dtype": "int8"},
    ):  # fmt: skip
        other = nn.ModuleDict({"out": nn.Linear(50, 7)})
        with pytest.raises(ValueError, match="layers: out: malformed spec"):
            memlm.build_layers_(other, {"out": {**specs["out"], **edit}})
        assert type(other["out"]) is nn.Linear


# --- layers that differ --------------------------------------------------------------------------


def test_targets_and_ignore(tmp_path):
    model = tiny.llama(tmp_path)
    config = memlm.QuantConfig(
        "int4", "int8",
        targets={
            "lm_head": "int8", r"re:model\.layers\.1\..*down_proj": None, "re:.*down_proj": "int8-row",
            "Embedding": "int8-g64",
        },
        ignore=[r"re:.*layers\.0\.self_attn"],
    )  # fmt: skip
    memlm.quantize_(model, config)
    formats = {n: str(m.format) for n, m in model.named_modules() if hasattr(m, "format")}
    assert formats.pop("lm_head") == "int8-g32" and formats.pop("model.embed_tokens") == "int8-g64"
    assert formats.pop("model.layers.0.mlp.down_proj") == "int8-row"
    assert len(formats) == 8 and set(formats.values()) == {"int4a-g32"}
    assert not any("layers.0.self_attn" in n or "1.mlp.down_proj" in n for n in formats)
    assert "ignored by a pattern" in str(memlm.explain(model))


def test_patterns_that_are_wrong():
    for bad, error, match in [
        ({"targets": {"0": "int3"}}, ValueError, "targets: 0: format: got 'int3'"),
        ({"targets": ["0"]}, TypeError, "targets: got list"),
        ({"ignore": "0"}, TypeError, "ignore: got '0'"),
        ({"ignore": ["re:("]}, ValueError, r"pattern 're:\('"),
        ({"targets": {"0": "int4"}, "mode": "w8a8", "linear": "int8-row"}, ValueError, "mode"),
    ]:
        with pytest.raises(error, match=match):
            memlm.QuantConfig(**bad)
    memlm.QuantConfig(ignore=["blocks[(0"])  # a name, no expression
    model = mlp(8, 8)
    for config in ({"targets": {"1": "int4"}}, {"ignore": ["re:1"]}):
        with pytest.raises(ValueError, match="pattern .* matches no layer"):
            memlm.quantize_(model, memlm.QuantConfig(**config))
    assert type(model[0]) is nn.Linear
