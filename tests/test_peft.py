"""LoRA of PEFT around packed layers."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import memlm
from memlm.layers import Linear, PackedModule
from tests import tiny

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(18).reshape(2, 9) * 7 % 256


@pytest.fixture
def base(tmp_path):
    """A packed tiny Llama that transformers loaded."""
    model = memlm.quantize_(tiny.llama(tmp_path / "float"), memlm.QuantConfig("int4", "int8"))
    model.save_pretrained(tmp_path / "packed")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def adapted(model, **settings):
    """With an adapter that changes the outputs: PEFT starts with B = 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        settings = {"r": 4, "target_modules": TARGETS, **settings}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def loss(model):
    return model(input_ids=IDS, labels=IDS).loss


def test_plain_get_peft_model_wraps_packed_layers(base):
    before = tiny.logits(base, IDS)
    model = adapted(base)
    assert model.targeted_module_names and not torch.equal(tiny.logits(model, IDS), before)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    assert isinstance(layer, memlm.peft.LoraLinear) and isinstance(layer.base_layer, Linear)
    x = torch.randn(3, 112)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + x @ a.T @ b.T * (8 / 4)
    torch.testing.assert_close(layer(x), expected)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, IDS), before)
    assert torch.equal(tiny.logits(model.unload(), IDS), before)


def test_gradients_are_those_of_the_float_layers_and_only_the_adapters(base):
    model = adapted(base)
    loss(model).backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    assert {name for name, grad in packed.items() if grad is not None} == {
        name for name in packed if ".lora_A." in name or ".lora_B." in name
    }
    assert all(grad.abs().sum() > 0 for grad in packed.values() if grad is not None)
    assert not any(t.requires_grad for t in model.buffers())

    model.zero_grad()
    for module in model.modules():  # fast rounds activations: compare without
        if isinstance(module, Linear):
            module.mode = "accurate"
    loss(model).backward()
    packed = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    memlm.dequantize_(model).zero_grad()
    loss(model).backward()
    for name, parameter in model.named_parameters():
        if name in packed:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_packed_weights(base):
    model = adapted(base, lora_dropout=0.1).train()
    before = {name: t.clone() for name, t in model.named_buffers() if "codes" in name}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    first = loss(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < 0.5 * first
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers() if name in before)


def test_adapters_are_saved_and_loaded(base, tmp_path):
    model = adapted(base).eval()
    expected = tiny.logits(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    stored = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert stored < 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) + 10_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(tiny.logits(loaded, IDS), expected)
    # transformers' own way, which reads the base model's folder from the adapter's config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(tiny.logits(loaded, IDS), expected)


def test_merging_refuses_packed_layers_and_is_exact_after_dequantising(base):
    model = adapted(base).eval()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="packed in int4a-g32.*dequantize_"):
            merge()
    memlm.dequantize_(model)
    expected = tiny.logits(model, IDS)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, PackedModule) for module in merged.modules())
    torch.testing.assert_close(tiny.logits(merged, IDS), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_take_adapters(base):
    model = adapted(base, target_modules=["embed_tokens"])
    layer = model.base_model.model.model.embed_tokens
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert a.shape == (4, 256) and b.shape == (64, 4)
    expected = layer.base_layer(IDS) + a.T[IDS] @ b.T * (8 / 4)
    torch.testing.assert_close(layer(IDS), expected)
    loss(model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_dora": True}]
)
def test_what_would_write_to_packed_weights_is_refused(base, settings):
    with pytest.raises(ValueError, match="init_lora_weights|use_dora"):
        adapted(base, **settings)


def test_all_linear_does_not_pass_over_packed_layers_in_silence(base):
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        adapted(base, target_modules="all-linear")
