"""The decoder against transformers, with and without a cache, and what it refuses."""

import copy

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import memlm
from memlm import data
from memlm.layers import native
from memlm.models.decoder import Decoder, DecoderConfig, linear

from . import real, tiny

# Logits are of order 1 to 10; f32 rounding through a few layers of sums of up to 112 terms.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def ids_of(*shape):
    return torch.randint(tiny.SIZES["vocab_size"], shape, generator=torch.manual_seed(1))


VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "rope llama3": {"rope_parameters": tiny.LLAMA3},
    "eps": {"rms_norm_eps": 0.1},
    "qwen2": {"cls": Qwen2ForCausalLM, "config": Qwen2Config},
    "mistral": {"cls": MistralForCausalLM, "config": MistralConfig, "sliding_window": None},
    "window": {"cls": MistralForCausalLM, "config": MistralConfig, "sliding_window": 33},
    "qwen2 window": {
        "cls": Qwen2ForCausalLM,
        "config": Qwen2Config,
        "use_sliding_window": True,
        "sliding_window": 50,
        "max_window_layers": 1,
    },
    "qwen3": {"cls": Qwen3ForCausalLM, "config": Qwen3Config, "head_dim": 24},
    "qwen3 window": {
        "cls": Qwen3ForCausalLM,
        "config": Qwen3Config,
        "head_dim": 24,
        "sliding_window": 20,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, settings):
    theirs = tiny.llama(tmp_path, **settings)
    ours = memlm.load(tmp_path)
    ids = ids_of(2, 300)
    with torch.inference_mode():
        result = ours(ids)
        last = ours(ids, last_only=True)
    expected = tiny.logits(theirs, ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(result, expected, **CLOSE)
    assert last.shape == (2, 1, 256)
    torch.testing.assert_close(last, expected[:, -1:], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_f32_as_transformers_is(tmp_path, dtype):
    theirs = tiny.llama(tmp_path)
    ids = ids_of(2, 64)
    exact = tiny.logits(theirs, ids)
    with torch.inference_mode():
        result = memlm.load(tmp_path, dtype)(ids)
    assert result.dtype == torch.float32
    their_error = (tiny.logits(theirs.to(dtype), ids).float() - exact).norm()
    assert (result - exact).norm() <= 1.5 * their_error


@pytest.mark.parametrize("pieces", [[1] * 40, [17, 1, 1, 21], [40], [1, 39]], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_cache_in_pieces_equals_all_at_once(tmp_path, pieces, batch):
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    ids = ids_of(batch, sum(pieces))
    cache = model.new_cache()
    with torch.inference_mode():
        parts = [model(part, cache) for part in ids.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), **CLOSE)
    assert [cache.length(sequence) for sequence in cache.sequences] == [sum(pieces)] * batch


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_cache_of_every_variant(tmp_path, settings, packed, monkeypatch):
    """Prefill in chunks and decoding, through torch's operations or in one call, equal all tokens at
    once without a cache; accurate mode, so that nothing but the order of sums differs."""
    monkeypatch.setattr(Decoder, "CHUNK", 64)
    tiny.llama(tmp_path, **settings)
    model = memlm.load(tmp_path)
    if packed:
        memlm.quantize_(model, memlm.QuantConfig("int8", "int8", "int8", mode="accurate"))
    ids, calls = ids_of(2, 150), count_native_calls(monkeypatch)
    with torch.inference_mode():
        expected = model(ids)
        for block_tokens in (32, 96):
            cache = model.new_cache(block_tokens=block_tokens)
            parts = [model(ids[:, :147], cache)]
            parts += [model(ids[:, i : i + 1], cache) for i in range(147, 150)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    # 147 tokens of 2 sequences in chunks of 32, and 3 times one.
    assert calls == ([] if not packed else [64] * 4 + [38] + [2] * 3) * 2


@pytest.mark.parametrize("kv", ["f32", "bf16", "int8", "int4"])
def test_chunks_and_calls_make_no_difference(tmp_path, kv, monkeypatch):
    """With keys and values rounded, too: what a token sees does not depend on what came with it, nor
    on who computes it."""
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    memlm.quantize_(model, memlm.QuantConfig("int8", "int8", "int8", mode="accurate"))
    ids, results = ids_of(2, 150), []
    for one_call in (True, False):
        if not one_call:
            monkeypatch.setattr(Decoder, "_native_layers", lambda *_: None)
        for chunk in (512, 90, 2):
            monkeypatch.setattr(Decoder, "CHUNK", chunk)
            with torch.inference_mode():
                results.append(model(ids, model.new_cache(kv)))
    # A last bit of a number may round a key, a value or a query the other way: by 1/127 of the largest
    # of its group, or in 4 bits by 1/15 of it.
    off = {"f32": 5e-5, "bf16": 0.05, "int8": 0.05, "int4": 0.3}[kv]
    for other in results[1:]:
        error = (other - results[0]).abs()
        assert error.max() < off and error.square().mean().sqrt() < off / 10


def count_native_calls(monkeypatch) -> list[int]:
    """The rows of each call of all layers at once, from now on."""
    calls, run = [], native.NativeLayers.run

    def counted(layers, x, *arguments):
        calls.append(len(x))
        run(layers, x, *arguments)

    monkeypatch.setattr(native.NativeLayers, "run", counted)
    return calls


@pytest.fixture
def packed(tmp_path):
    tiny.llama(tmp_path)
    return memlm.quantize_(memlm.load(tmp_path), memlm.QuantConfig("int4", "int8", "int8"))


def bias(model):
    """Gives every layer's o_proj a bias, in the dtype of the norms."""
    for layer in model.layers:
        weight = layer.input_norm.weight
        layer.attention.o_proj.bias = torch.nn.Parameter(torch.full_like(weight, 0.25))


def other_norm(model):
    model.layers[1].post_norm = torch.nn.LayerNorm(64).requires_grad_(False)


def own_forward(model):
    mlp = model.layers[0].mlp
    mlp.forward = lambda x, norm: x


# What changes between two calls -> whether all layers are one call after it.
CHANGES = {
    "nothing": (lambda m: None, True),
    "mode": (lambda m: setattr(m.layers[1].mlp.down_proj, "mode", "accurate"), True),
    "weights in place": (lambda m: m.layers[0].mlp.down_proj.codes.fill_(0x88), True),
    "weights replaced": (
        lambda m: m.layers[0].mlp.down_proj.register_buffer("codes", m.layers[0].mlp.down_proj.codes * 0), True,
    ),
    "another layer": (lambda m: m.layers.__setitem__(0, copy.deepcopy(m.layers[1])), True),
    "norm": (lambda m: setattr(m.layers[0].input_norm, "weight", torch.nn.Parameter(torch.ones(64))), True),
    "bias": (bias, True),
    "bf16": (lambda m: m.to(torch.bfloat16), True),
    "f16": (lambda m: m.half(), True),
    "float layer": (lambda m: setattr(m.layers[1].mlp, "down_proj", m.layers[1].mlp.down_proj.to_float()), False),
    "another norm": (other_norm, False),
    "hook": (lambda m: m.layers[0].mlp.register_forward_hook(lambda module, x, y: y * 2), False),
    "pre-hook": (lambda m: m.layers[1].register_forward_pre_hook(lambda module, x: None), False),
    "hook on a layer's weights": (
        lambda m: m.layers[1].mlp.down_proj.register_forward_hook(lambda module, x, y: y + 1), False,
    ),
    "forward": (own_forward, False),
    "one norm's dtype": (lambda m: m.layers[0].input_norm.to(torch.float64), False),
    "eps": (lambda m: setattr(m.layers[0].input_norm, "eps", 0.5), False),
}  # fmt: skip


@pytest.mark.parametrize("change, one_call", CHANGES.values(), ids=CHANGES)
def test_changes_between_calls_are_noticed(packed, change, one_call, monkeypatch):
    """The call of all layers computes what their modules do, after every change of theirs, or is not
    made."""
    calls = count_native_calls(monkeypatch)
    ids = ids_of(1, 6)

    def run(model):
        return model(ids, model.new_cache())

    with torch.inference_mode():
        before = run(packed)
        assert calls == [6]
        change(packed)
        if change is CHANGES["one norm's dtype"][0]:
            with pytest.raises((RuntimeError, TypeError)):  # as the modules say
                run(packed)
            return
        result = run(packed)
        assert calls == [6] * (2 if one_call else 1)
        monkeypatch.setattr(Decoder, "_native_layers", lambda *_: None)
        expected = run(packed)
    # The same products; rotations and, in half precision, sums of the residual round otherwise, which
    # may flip activations by one of 127 steps.
    size = expected.abs().max()
    assert (result - expected).abs().max() < 0.05 * size
    if change is not CHANGES["nothing"][0] and change is not CHANGES["pre-hook"][0]:
        assert not torch.equal(result, before)


@pytest.mark.parametrize(
    "context",
    [torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["grad", "autocast"],
)
def test_not_one_call_where_operations_are_recorded_or_cast(packed, context, monkeypatch):
    calls, ids = count_native_calls(monkeypatch), ids_of(1, 6)
    with torch.no_grad(), context():
        result = packed(ids, packed.new_cache())
    assert calls == []
    with torch.no_grad():
        expected = packed(ids, packed.new_cache())
    assert calls == [6] and (result - expected).abs().max() < 0.05 * expected.abs().max()


def test_independent_of_threads(packed, restore_threads):
    ids, results = ids_of(1, 300), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        cache = packed.new_cache()
        with torch.inference_mode():
            results.append([packed(ids, cache), packed(ids[:, :1], cache)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_copies_and_pickles(packed, tmp_path):
    ids = ids_of(1, 6)
    with torch.inference_mode():
        expected = packed(ids, packed.new_cache())
        twin = copy.deepcopy(packed)
        torch.save(packed, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        packed.layers[0].mlp.down_proj.codes.fill_(0x88)
        for model in (twin, loaded):
            assert torch.equal(model(ids, model.new_cache()), expected)


def test_the_likeliest_without_the_others(packed):
    x = torch.randn(3, 64, generator=torch.manual_seed(0))
    with torch.inference_mode():
        logits = packed.logits(x)
        for model in (packed, memlm.dequantize_(copy.deepcopy(packed))):
            expected = model.logits(x).topk(5)
            values, ids = model.top(x, 5)
            assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)
    assert logits.shape == (3, 256)


def test_positions_are_limited(tmp_path):
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    cache = model.new_cache()
    with torch.inference_mode():
        model(ids_of(1, 512), cache)
        with pytest.raises(ValueError, match="ids: 513 tokens, the model takes 512"):
            model(ids_of(1, 1), cache)
    assert cache.length(cache.sequences[0]) == 512


def test_cache_of_another_batch_is_refused(tmp_path):
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    cache = model.new_cache()
    with torch.inference_mode():
        model(ids_of(2, 3), cache)
        with pytest.raises(ValueError, match="ids: a batch of 1, the cache holds 2"):
            model(ids_of(1, 3), cache)
    assert [cache.length(sequence) for sequence in cache.sequences] == [3, 3]


@pytest.mark.parametrize("kv, off", [("bf16", 0.02), ("int8", 0.02), ("int4", 0.5)])
def test_rounded_caches_are_near(tmp_path, kv, off):
    """Relative to logits of standard deviation 1: what rounding to 8, 7 and 4 bits makes of them."""
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    ids = ids_of(1, 200)
    with torch.inference_mode():
        exact, near = model(ids), model(ids, model.new_cache(kv))
    error = (near - exact).square().mean().sqrt() / exact.std()
    assert 1e-5 < error < off


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0), (1, 513), (1, 2, 3)], ids=str)
def test_bad_ids(tmp_path, shape):
    tiny.llama(tmp_path)
    with pytest.raises(ValueError, match="ids: "):
        memlm.load(tmp_path)(torch.zeros(shape, dtype=torch.int64))


def test_gradients_are_those_of_transformers(tmp_path):
    """With no cache the decoder trains."""
    theirs = tiny.llama(tmp_path)
    ours = memlm.load(tmp_path)
    ids = ids_of(2, 20)
    ours(ids).logsumexp(-1).mean().backward()
    theirs(ids).logits.logsumexp(-1).mean().backward()
    expected = theirs.model.layers[0].mlp.down_proj.weight.grad
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(
        ours.layers[0].mlp.down_proj.weight.grad, expected, rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("embedding", [None, "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_is_the_model_of_the_dequantised_weights(tmp_path, tied, embedding):
    """Accurate mode: no rounding beyond that of the weights."""
    tiny.llama(tmp_path, tie_word_embeddings=tied)
    model = memlm.load(tmp_path)
    config = memlm.QuantConfig("int4", embedding, embedding, mode="accurate")
    memlm.quantize_(model, config, strict=True)
    ids = ids_of(2, 50)
    with torch.inference_mode():
        packed = model(ids)
        memlm.dequantize_(model)
        torch.testing.assert_close(packed, model(ids), **CLOSE)


BAD = {
    "model_type": ({"model_type": "mamba"}, "model_type 'mamba'; known are llama"),
    "no model_type": ({"model_type": None}, "model_type None"),
    "list model_type": ({"model_type": ["llama"]}, "model_type"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "mlp bias": ({"mlp_bias": True}, "biases"),
    "attention bias": ({"attention_bias": True}, "biases"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    "old yarn": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
    "rope list": ({"rope_parameters": {"rope_type": ["default"]}}, "rope_type"),
    "rope per layer": ({"rope_parameters": {"full": {"rope_type": "default"}}}, "one flat object"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
    "zero factor": ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
    "equal": ({"rope_parameters": {**tiny.LLAMA3, "high_freq_factor": 1.0}}, "below"),
    "theta": ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
    "nan eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "huge eps": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "many layers": ({"num_hidden_layers": 10**9}, "1000000000 layers, but 21 tensors"),
    "true": ({"vocab_size": True}, "vocab_size is True"),
    "float": ({"hidden_size": 64.0}, "hidden_size is 64.0"),
    "heads": ({"num_attention_heads": 3}, "3 heads over 2"),
    "odd head": ({"head_dim": 15}, "of size 15"),
    "narrow": ({"head_dim": None, "num_attention_heads": 128}, "head_dim is 0"),
    "overflow": ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "config"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_configs_that_are_not_computed_are_refused(tmp_path, changes, message):
    tiny.llama(tmp_path)
    tiny.edit_config(tmp_path, **changes)
    with pytest.raises(memlm.FormatError, match=message):
        memlm.load(tmp_path)


def test_windows_of_configs():
    sizes = {**tiny.SIZES, "model_type": "mistral"}
    assert DecoderConfig.from_hf({**sizes, "sliding_window": 4096}).windows == (4096, 4096)
    assert DecoderConfig.from_hf({**sizes, "sliding_window": None}).windows == ()
    sizes = {**tiny.SIZES, "model_type": "qwen2", "sliding_window": 9}
    assert DecoderConfig.from_hf(sizes).windows == ()
    used = {**sizes, "use_sliding_window": True}
    assert DecoderConfig.from_hf({**used, "max_window_layers": 1}).windows == (0, 9)
    kinds = ["sliding_attention", "full_attention"]
    assert DecoderConfig.from_hf({**used, "layer_types": kinds}).windows == (9, 0)
    for wrong in (kinds[:1], [*kinds, 3], ["x", "y"], "full_attention"):
        with pytest.raises(memlm.FormatError, match="layer_types"):
            DecoderConfig.from_hf({**used, "layer_types": wrong})
    with pytest.raises(memlm.FormatError, match="max_window_layers"):
        DecoderConfig.from_hf({**used, "max_window_layers": "all"})


def test_a_norm_with_a_hook_or_of_another_kind_is_called(tmp_path):
    tiny.llama(tmp_path)
    model = memlm.quantize_(memlm.load(tmp_path), memlm.QuantConfig("int8", head="int8"))
    ids, called = ids_of(1, 5), []
    with torch.inference_mode():
        fused = model(ids)
        model.layers[0].input_norm.register_forward_hook(lambda *_: called.append(1))
        torch.testing.assert_close(model(ids), fused, rtol=1e-4, atol=1e-4)
        assert called == [1]
        x, other = torch.randn(3, 64) + 1, torch.nn.LayerNorm(64)  # has weight and eps, too
        assert torch.equal(linear(model.lm_head, x, other), model.lm_head(other(x)))


@pytest.mark.models
def test_smollm2_logits_are_those_of_transformers():
    ours = memlm.load(data.smollm2_gguf(), dequantize=True)
    ids = torch.tensor([ours.tokenizer.encode(data.moby_dick()[:2000])[:128]])
    with torch.inference_mode():
        result = ours(ids)
    expected = tiny.logits(real.smollm2_of_transformers(), ids)
    # Logits reach 20 to 30 here; 30 layers of f32 sums in another order.
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)
    assert (result.argmax(-1) == expected.argmax(-1)).all()
