"""The decoder against transformers, with and without a cache, and what it refuses."""

import weakref

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import memlm
from memlm import data
from memlm.models.decoder import DecoderConfig, KVCache, linear

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
    assert cache.length == sum(pieces)


def test_cache_grows_up_to_the_models_positions(tmp_path):
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    ids = ids_of(1, 512)
    cache, per_position = model.new_cache(), 2 * 2 * 2 * 16 * 4  # k and v, layers, heads, dim, f32
    with torch.inference_mode():
        expected = model(ids)
        model(ids[:, :250], cache)
        assert cache.nbytes == KVCache.STEP * per_position
        parts = [model(ids[:, i : i + 1], cache) for i in range(250, 260)]
        assert cache.nbytes == 512 * per_position
        parts.append(model(ids[:, 260:], cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), expected[:, 250:], **CLOSE)
        with pytest.raises(ValueError, match="ids: 513 tokens, the model takes 512"):
            model(ids[:, :1], cache)
    assert cache.length == 512


def test_growing_doubles():
    cache = KVCache(1, 10_000)
    sizes = set()
    for _ in range(1500):
        new = torch.zeros(1, 1, 1, 2)
        cache.append(0, new, new)
        cache.advance(1)
        sizes.add(cache.nbytes // 16)
    assert sorted(sizes) == [256, 512, 1024, 2048]


def test_growing_keeps_one_old_store_at_a_time():
    cache, alive = KVCache(4, 4096), []
    new = torch.ones(1, 2, cache.STEP, 8)
    for layer in range(4):
        cache.append(layer, new, new)
    cache.advance(cache.STEP)
    assert {t.shape[2] for t in cache.tensors()} == {cache.STEP}
    old, grown = [weakref.ref(t) for t in cache.tensors()], cache._grown

    def counting(*arguments):
        alive.append(sum(store() is not None for store in old))
        return grown(*arguments)

    cache._grown = counting
    keys, _ = cache.append(0, new[:, :, :1], new[:, :, :1])
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1] and keys.shape[2] == cache.STEP + 1
    assert {t.shape[2] for t in cache.tensors()} == {2 * cache.STEP}


def test_cache_of_another_batch_is_refused(tmp_path):
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    cache = model.new_cache()
    with torch.inference_mode():
        model(ids_of(2, 3), cache)
        with pytest.raises(ValueError, match="ids: a batch of 1, the cache holds 2"):
            model(ids_of(1, 3), cache)
    assert cache.length == 3


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


def test_sliding_windows_are_refused():
    sizes = {**tiny.SIZES, "model_type": "mistral"}
    with pytest.raises(memlm.FormatError, match="sliding-window"):
        DecoderConfig.from_hf({**sizes, "sliding_window": 4096})
    assert DecoderConfig.from_hf({**sizes, "sliding_window": None}).head_dim == 16
    with pytest.raises(memlm.FormatError, match="sliding-window"):
        DecoderConfig.from_hf({**sizes, "model_type": "qwen2", "use_sliding_window": True})


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
