"""attn_implementation="memlm": the same logits and gradients as transformers' own attention."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM, BertModel, Gemma2Config, Gemma2ForCausalLM, GptOssConfig,
    GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
    Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)  # fmt: skip

from memlm import hf_attention
from tests import tiny
from tests.test_packaging import ROOT

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Of the windows, 5 keys are less than the tokens below.
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "gemma2": (
        Gemma2ForCausalLM, Gemma2Config,
        {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 2.0,
         "query_pre_attn_scalar": 8},
    ),
    "gpt_oss": (
        GptOssForCausalLM, GptOssConfig,
        {"head_dim": 16, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
    # Its layers do not tell their attention that there is a window.
    "qwen2_moe": (
        Qwen2MoeForCausalLM, Qwen2MoeConfig,
        {**EXPERTS, "shared_expert_intermediate_size": 16, "sliding_window": 5,
         "use_sliding_window": True, "max_window_layers": 1},
    ),
}  # fmt: skip
IDS = torch.randint(256, (2, 19), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(IDS)
PADDING[0, :4] = 0  # to the left, as generate wants it


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    cls, config, settings = MODELS[request.param]
    tiny.llama(tmp_path, cls, config, tie_word_embeddings=False, **settings)
    return tmp_path


def load(folder, implementation, **settings):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=implementation, **settings
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("mask", [None, PADDING], ids=["whole", "padded"])
def test_logits_and_gradients(folder, mask):
    results = []
    for implementation in ("memlm", "eager"):
        model = load(folder, implementation)
        logits = model(IDS, attention_mask=mask).logits
        seen = logits if mask is None else logits[mask.bool()]
        seen.square().mean().backward()
        results.append([seen.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    for a, b in zip(*results):
        close(a, b)


def test_window_sinks_and_cap_matter(folder, request):
    """What the models above have beside Llama changes their results: it isn't left out on both sides."""
    model = load(folder, "memlm")
    before = tiny.logits(model, IDS)
    config = model.config
    if getattr(config, "sliding_window", None):
        config.sliding_window = 100
    if getattr(config, "attn_logit_softcapping", None):
        config.attn_logit_softcapping = 1e6
    config.save_pretrained(folder)
    changed = tiny.logits(load(folder, "memlm"), IDS)
    assert torch.equal(before, changed) == (config.model_type in ("llama", "qwen3"))


def test_steps_with_a_cache(folder):
    """In pieces of several tokens and of one, as in chunked prefill and decoding."""
    model, eager = load(folder, "memlm"), load(folder, "eager")
    with torch.inference_mode():
        for mask in (None, PADDING):
            cache, logits = None, []
            for piece in (slice(0, 7), slice(7, 15), slice(15, 16), slice(16, 17), slice(17, 19)):
                seen = None if mask is None else mask[:, : piece.stop]
                step = model(
                    IDS[:, piece], attention_mask=seen, past_key_values=cache, use_cache=True
                )
                cache = step.past_key_values
                logits.append(step.logits)
            whole = eager(IDS, attention_mask=mask).logits
            seen = PADDING.bool() if mask is not None else torch.ones_like(PADDING).bool()
            close(torch.cat(logits, 1)[seen], whole[seen])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(folder, cache):
    tokens = [
        load(folder, implementation).generate(
            IDS,
            attention_mask=PADDING,
            max_new_tokens=8,
            do_sample=False,
            cache_implementation=cache,
        )
        for implementation in ("memlm", "eager")
    ]
    assert tokens[0].shape == (2, 27) and torch.equal(*tokens)


def test_set_attn_implementation_and_beams(tmp_path):
    tiny.llama(tmp_path)
    model = load(tmp_path, "eager")
    expected = model.generate(IDS, max_new_tokens=6, num_beams=3, do_sample=False)
    model.set_attn_implementation("memlm")
    assert model.config._attn_implementation == "memlm"
    assert torch.equal(
        model.generate(IDS, max_new_tokens=6, num_beams=3, do_sample=False), expected
    )


@pytest.mark.parametrize("mask", [None, PADDING], ids=["whole", "padded"])
def test_encoder(tmp_path, mask):
    tiny.bert(tmp_path)
    states = []
    for implementation in ("memlm", "eager"):
        model = BertModel.from_pretrained(tmp_path, attn_implementation=implementation)
        with torch.inference_mode():
            states.append(model(IDS, attention_mask=mask).last_hidden_state)
    seen = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    close(states[0][seen], states[1][seen])


def test_masks_of_ones_own(tmp_path):
    """4-dimensional, bool or added, as prefix language models have them."""
    tiny.llama(tmp_path)
    model, eager = load(tmp_path, "memlm"), load(tmp_path, "eager")
    i = torch.arange(19)
    seen = ((i <= i[:, None]) | (i < 6)).expand(2, 1, 19, 19)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = eager(IDS, attention_mask=added).logits
        close(model(IDS, attention_mask=added).logits, expected)
        close(model(IDS, attention_mask=seen).logits, expected)
        with pytest.raises(
            ValueError, match=r"attention_mask: got shape \[2, 1, 1, 19\], expected 19 rows"
        ):
            model(IDS, attention_mask=PADDING[:, None, None].bool())


def test_packed_sequences(tmp_path):
    """Position ids that start anew separate sequences in one row."""
    tiny.llama(tmp_path)
    model, eager = load(tmp_path, "memlm"), load(tmp_path, "eager")
    ids, positions = IDS[:1], torch.cat((torch.arange(8), torch.arange(11)))[None]
    with torch.inference_mode():
        close(model(ids, position_ids=positions).logits, eager(ids, position_ids=positions).logits)


def test_no_matrix_of_masks(tmp_path, monkeypatch):
    """Causal, in a window, padded, after a cache: the masks stay a row for each sequence."""
    cls, config, settings = MODELS["mistral"]
    tiny.llama(tmp_path, cls, config, **settings)
    model, sizes = load(tmp_path, "memlm"), []
    attention = hf_attention.attention

    def watched(query, key, value, mask, *rest, **options):
        sizes.append(0 if mask is None else mask.numel())
        return attention(query, key, value, mask, *rest, **options)

    monkeypatch.setattr(hf_attention, "attention", watched)
    with torch.inference_mode():
        model(IDS)
        step = model(IDS[:, :9], attention_mask=PADDING[:, :9], use_cache=True)
        model(IDS[:, 9:], attention_mask=PADDING, past_key_values=step.past_key_values)
    assert sizes and max(sizes) <= 2 * 19


def test_training_with_dropout(tmp_path):
    tiny.llama(tmp_path, attention_dropout=0.5)
    model = load(tmp_path, "memlm").train()
    torch.manual_seed(0)
    a, b = model(IDS).logits, model(IDS).logits
    torch.manual_seed(0)
    assert torch.equal(model(IDS).logits, a) and not torch.equal(a, b)
    a.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.isfinite().all()
    model.eval()
    close(tiny.logits(model, IDS), tiny.logits(load(tmp_path, "eager"), IDS))


def test_gradient_checkpointing(tmp_path):
    cls, config, settings = MODELS["mistral"]
    tiny.llama(tmp_path, cls, config, **settings)
    grads = []
    for checkpoint in (False, True):
        model = load(tmp_path, "memlm").train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        model(IDS, attention_mask=PADDING).logits.sum().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(*grads)


def test_bf16_and_autocast(tmp_path):
    tiny.llama(tmp_path)
    half = tiny.logits(load(tmp_path, "memlm", dtype=torch.bfloat16), IDS)
    model = load(tmp_path, "memlm")
    expected = tiny.logits(model, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = tiny.logits(model, IDS)
    for logits in (half, cast):
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).norm() < 0.03 * expected.norm()


def test_compile(tmp_path):
    cls, config, settings = MODELS["mistral"]
    tiny.llama(tmp_path, cls, config, **settings)
    model = load(tmp_path, "memlm")
    expected = tiny.logits(model, IDS)
    torch._dynamo.reset()
    close(tiny.logits(torch.compile(model, fullgraph=True), IDS), expected)


def test_attentions_are_refused(tmp_path):
    tiny.llama(tmp_path)
    with pytest.raises(ValueError, match="output_attentions: memlm's attention makes no matrix"):
        load(tmp_path, "memlm")(IDS, output_attentions=True)


def test_registered_on_import():
    """In either order, and without a model in between."""
    for imports in ("import memlm, transformers", "import transformers.modeling_utils, memlm"):
        script = f"""
{imports}
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, attn_implementation="memlm")
print(LlamaForCausalLM(config).config._attn_implementation)
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert done.stdout.strip() == "memlm"
