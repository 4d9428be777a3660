"""Decoder layers of transformers as one call each: they compute what the layers by themselves do."""

import copy
import dataclasses
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)  # fmt: skip

import memlm
from memlm import QuantConfig
from memlm.layers import Linear
from tests import tiny

KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
}
CONFIG = QuantConfig("int4", embedding="int8", head="int8")
IDS = torch.randint(1, 256, (3, 11), generator=torch.manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[1, :4] = 0
PADDED[2, :2] = 0
# Both multiply by the same kernels; norms, rotations and softmax differ by some f32 roundings.  An
# int8 rounding of inputs that these turn over at a tie is 1/254 of the largest of them: 0.03 in a
# logit of about 4.  Room for ten; where something is wrong, logits are others altogether.
BOUND = 0.3
# Where inputs are not rounded: logits of about 4, 2 layers of 9 operations and the head, each of sums
# of up to 128 terms, which err by half of an f32's eps a term.
EXACT_BOUND = 4 * 19 * 128 * 2**-24
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def made(kind, folder, mode=None):
    """A quantised model, and the same with its layers fused."""
    cls, config, settings = KINDS[kind]
    model = tiny.llama(folder / "float", cls, config, **settings)
    memlm.quantize_(model, dataclasses.replace(CONFIG, mode=mode))
    return model, memlm.hf.fuse_layers(copy.deepcopy(model))


@pytest.fixture
def pair(kind, tmp_path):
    return made(kind, tmp_path)


@pytest.fixture
def exact_pair(kind, tmp_path):
    """With inputs that are not rounded."""
    return made(kind, tmp_path, "accurate")


@pytest.fixture
def llama(tmp_path):
    """With inputs that are not rounded."""
    return memlm.quantize_(tiny.llama(tmp_path / "float"), dataclasses.replace(CONFIG, mode="accurate"))


def ran_natively(model) -> bool:
    return all(layer._native is not None for layer in model.model.layers)


def test_prompt_and_next_token(pair):
    plain, fused = pair
    cache, usual = memlm.hf.PagedCache(fused.config, "f32"), DynamicCache(config=plain.config)
    mask = PADDED
    with torch.inference_mode():
        for ids in (IDS, IDS[:, :1], IDS[:, 3:5]):
            if ids is not IDS:
                mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
            expected = plain(ids, attention_mask=mask, cache=usual).logits
            got = fused(ids, attention_mask=mask, cache=cache).logits
            told = mask[:, -ids.shape[1] :].bool()
            assert (got - expected)[told].abs().max() < BOUND
    assert ran_natively(fused)


def test_logits_without_rounded_inputs(exact_pair):
    plain, fused = exact_pair
    cache = memlm.hf.PagedCache(fused.config, "f32")
    told = PADDED.bool()
    with torch.inference_mode():
        expected = plain(IDS, attention_mask=PADDED).logits
        got = [fused(IDS[:, :7], attention_mask=PADDED[:, :7], cache=cache).logits]
        for i in range(7, IDS.shape[1]):
            mask = PADDED[:, : i + 1]
            got.append(fused(IDS[:, i : i + 1], attention_mask=mask, cache=cache).logits)
    assert ran_natively(fused)
    assert (torch.cat(got, 1) - expected)[told].abs().max() < EXACT_BOUND


def test_a_mask_of_its_own_without_a_cache(exact_pair):
    plain, fused = exact_pair
    mask = torch.ones(len(IDS), 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    mask[..., 6:, 5] = False
    with torch.inference_mode():
        expected, got = (m(IDS, attention_mask=mask).logits for m in (plain, fused))
        assert (got - expected).abs().max() < EXACT_BOUND
        cache = memlm.hf.PagedCache(fused.config, "f32")
        with pytest.raises(ValueError, match="attention_mask: a PagedCache knows causal masks"):
            fused(IDS, attention_mask=mask, cache=cache)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"num_return_sequences": 2, "num_beams": 2}],
    ids=["greedy", "beams", "sampling", "beams returned"],
)
def test_generate_gives_the_same_tokens(exact_pair, settings):
    made = []
    for model in exact_pair:
        torch.manual_seed(3)
        made.append(model.generate(IDS, attention_mask=PADDED, **{**GREEDY, **settings}))
    assert torch.equal(*made)
    assert ran_natively(exact_pair[1])


def test_generate_gives_its_logits(exact_pair):
    settings = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    plain, fused = (model.generate(IDS, attention_mask=PADDED, **settings) for model in exact_pair)
    assert torch.equal(plain.sequences, fused.sequences)
    assert len(fused.logits) == GREEDY["max_new_tokens"]
    assert max((a - b).abs().max() for a, b in zip(plain.logits, fused.logits)) < EXACT_BOUND


def test_attention_matrices_are_for_eager(llama):
    settings = {"output_attentions": True, "return_dict_in_generate": True, **GREEDY}
    fused = memlm.hf.fuse_layers(copy.deepcopy(llama))
    with pytest.raises(ValueError, match="memlm's attention makes no matrix; 'eager' does"):
        fused.generate(IDS, **settings)
    for model in (llama, fused):
        model.set_attn_implementation("eager")
    expected, got = (m.generate(IDS, attention_mask=PADDED, **settings) for m in (llama, fused))
    assert torch.equal(expected.sequences, got.sequences)
    for a, b in zip(expected.attentions, got.attentions, strict=True):
        torch.testing.assert_close(a, b)


def test_drafts_are_taken_back(exact_pair):
    """Where a window has evicted what that needs, with transformers' cache."""
    plain, fused = exact_pair
    expected = plain.generate(IDS[:1], **GREEDY)
    assert torch.equal(fused.generate(IDS[:1], prompt_lookup_num_tokens=3, **GREEDY), expected)
    for assistant in (plain, copy.deepcopy(fused)):
        got = fused.generate(IDS[:1], assistant_model=assistant, **GREEDY)
        assert torch.equal(got, expected)
    if getattr(fused.config, "sliding_window", None) is None:
        assert ran_natively(fused)


def test_adapters(llama):
    """LoRA on fused layers, as on layers by themselves; a model that has adapters is refused."""
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    fused = memlm.hf.fuse_layers(copy.deepcopy(llama))
    made, gradients = [], []
    for model in (llama, fused):
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        made.append(model.generate(input_ids=IDS, attention_mask=PADDED, **GREEDY))
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(*made)
    assert any("lora_A" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())
        )
    with pytest.raises(ValueError, match="layer 0: linear: got LoraLinear"):
        memlm.hf.fuse_layers(llama)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama, dtype):
    llama.to(dtype)
    fused = memlm.hf.fuse_layers(copy.deepcopy(llama))
    cache = memlm.hf.PagedCache(fused.config, "bf16" if dtype == torch.bfloat16 else "f32")
    with torch.inference_mode():
        expected, got = llama(IDS).logits, fused(IDS, cache=cache).logits
    assert ran_natively(fused) and got.dtype == dtype
    # Activations are rounded at other places, in either by up to eps / 2 each: the difference is
    # judged by what the rounding to this dtype itself does.
    exact = copy.deepcopy(llama).float()
    with torch.inference_mode():
        own = (expected.float() - exact(IDS).logits).norm()
        assert (got.float() - expected.float()).norm() < 3 * own


def test_generate_takes_a_cache_of_the_storage_asked_for(llama, monkeypatch):
    made = []
    original = memlm.hf.PagedCache.__init__

    def noted(self, config, dtype="bf16", *args):
        made.append(dtype)
        original(self, config, dtype, *args)

    monkeypatch.setattr(memlm.hf.PagedCache, "__init__", noted)
    memlm.hf.fuse_layers(llama, kv="int8").generate(IDS, **GREEDY)
    memlm.hf.fuse_layers(llama).generate(IDS, **GREEDY)
    assert made == ["int8", "f32"]
    llama.generate(IDS, cache=DynamicCache(config=llama.config), **GREEDY)
    llama.generate(IDS, use_cache=False, **GREEDY)
    llama.generate(IDS, cache_implementation="dynamic", **GREEDY)
    assert made == ["int8", "f32"]


def test_without_a_paged_cache_layers_are_transformers_own(pair):
    plain, fused = pair
    with torch.inference_mode():
        expected, got = (model(IDS, attention_mask=PADDED).logits for model in pair)
    assert (got - expected)[PADDED.bool()].abs().max() < BOUND
    assert not any(layer._native for layer in fused.model.layers)


def test_gradients_flow(llama):
    fused = memlm.hf.fuse_layers(copy.deepcopy(llama))
    for model in (llama, fused):
        for layer in model.model.layers:
            layer.input_layernorm.weight.requires_grad_(True)
        model(IDS).logits.square().sum().backward()
    for a, b in zip(llama.model.layers, fused.model.layers):
        expected, got = a.input_layernorm.weight.grad, b.input_layernorm.weight.grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_hooks_and_replaced_modules_are_honoured(llama):
    fused = memlm.hf.fuse_layers(llama)
    cache = lambda: memlm.hf.PagedCache(fused.config, "f32")  # noqa: E731
    with torch.inference_mode():
        before = fused(IDS, cache=cache()).logits
        assert ran_natively(fused)
        seen = []
        handle = fused.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(args[2]))
        assert (fused(IDS, cache=cache()).logits - before).abs().max() < EXACT_BOUND
        assert len(seen) == 1
        handle.remove()
        hidden = fused(IDS, cache=cache(), output_hidden_states=True).hidden_states
        assert len(hidden) == len(fused.model.layers) + 1
        fused.model.layers[0].self_attn.o_proj = nn.Linear(64, 64, bias=False)
        changed = fused(IDS, cache=cache()).logits
        assert (changed - before).abs().max() > 100 * EXACT_BOUND
        fused.model.layers[1].input_layernorm.weight.data = torch.zeros(64)
        assert not torch.equal(fused(IDS, cache=cache()).logits, changed)


def test_weights_are_there_once(llama):
    memlm.hf.fuse_layers(llama)
    llama.generate(IDS, **GREEDY)
    for layer in llama.model.layers:
        native = layer._native[0]._layers[0]
        attention, mlp = layer.self_attn, layer.mlp
        for whole, parts in (
            (native.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (native.gate_up, (mlp.gate_proj, mlp.up_proj)),
        ):
            storages = {p.codes.untyped_storage().data_ptr() for p in parts}
            assert storages == {whole.codes.untyped_storage().data_ptr()}


def test_saved_as_before(llama, tmp_path):
    llama.save_pretrained(tmp_path / "before")
    memlm.hf.fuse_layers(llama).save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(
        memlm.hf.fuse_layers(loaded).generate(IDS, **GREEDY), llama.generate(IDS, **GREEDY)
    )


def test_copied_and_pickled(llama):
    memlm.hf.fuse_layers(llama)
    expected = llama.generate(IDS, **GREEDY)
    layer = pickle.loads(pickle.dumps(llama.model.layers[0]))
    assert type(layer) is type(llama.model.layers[0]) and layer._native is None
    assert torch.equal(copy.deepcopy(llama).generate(IDS, **GREEDY), expected)


def test_unfused(llama):
    kind = type(llama.model.layers[0])
    expected = llama.generate(IDS, **GREEDY)
    memlm.hf.unfuse_layers(memlm.hf.fuse_layers(llama))
    assert all(type(layer) is kind for layer in llama.model.layers)
    assert "_prepare_cache_for_generation" not in llama.__dict__
    assert torch.equal(llama.generate(IDS, **GREEDY), expected)


def test_what_does_not_fit_is_refused_and_left_alone(llama, tmp_path):
    kind = type(llama.model.layers[0])
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no layers of LlamaDecoderLayer"):
        memlm.hf.fuse_layers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)))
    with pytest.raises(ValueError, match="layer 0: linear: got Linear, accepted is memlm's"):
        memlm.hf.fuse_layers(tiny.llama(tmp_path / "plain"))
    llama.model.layers[1].self_attn.q_proj.mode = "fast"
    with pytest.raises(ValueError, match="layer 1: linear: layers of one input have modes"):
        memlm.hf.fuse_layers(llama)
    assert all(type(layer) is kind for layer in llama.model.layers)
    assert llama.config._attn_implementation != "memlm"
    odd = tiny.llama(tmp_path / "odd", intermediate_size=104)
    with pytest.raises(ValueError, match=r"\[104, 104\] rows, accepted are multiples of 16"):
        memlm.hf.fuse_layers(memlm.quantize_(odd, QuantConfig("int4-g32")))
    assert isinstance(odd.model.layers[0].mlp.gate_proj, Linear)
