"""Models from files and back: what is mapped, what survives, what is refused."""

import copy
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memlm
from memlm import data
from memlm.memory import file_mapping

from . import tiny

IDS = torch.arange(60).view(2, 30)
WEIGHTS = "model.safetensors"


def run(model):
    with torch.inference_mode():
        return model(IDS)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny.llama(folder)
    tiny.tokenizer(folder)
    return folder


def edit_weights(folder, edit):
    file = folder / WEIGHTS
    tensors = safetensors.torch.load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    safetensors.torch.save_file(tensors, file)


# --- float checkpoints ---------------------------------------------------------------------------


def test_sharded_equals_whole(tmp_path):
    model = tiny.llama(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(run(memlm.load(tmp_path / "whole")), run(memlm.load(tmp_path / "sharded")))


def test_float_weights_that_need_no_joining_are_mapped(source):
    model = memlm.load(source)
    file = safetensors.torch.load_file(source / WEIGHTS)
    mapped = file_mapping(source / WEIGHTS)
    assert mapped.size >= (source / WEIGHTS).stat().st_size and mapped.private == 0
    inside = lambda t: any(  # noqa: E731
        start <= t.data_ptr() < end for start, end in mapped_ranges(source / WEIGHTS)
    )
    assert inside(model.embed_tokens.weight) and inside(model.layers[0].mlp.down_proj.weight)
    assert not inside(model.layers[0].attention.qkv_proj.weight)
    assert torch.equal(model.embed_tokens.weight, file["model.embed_tokens.weight"])


def mapped_ranges(path):
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.rstrip().endswith(str(path.resolve())):
                yield tuple(int(part, 16) for part in line.split()[0].split("-"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_that_of_all_float_weights(source, dtype):
    model = memlm.load(source, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert memlm.load(source).norm.weight.dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_none_is_the_files(source, stored):
    edit_weights(source, lambda t: t.update({n: v.to(stored) for n, v in t.items()}))
    model = memlm.load(source)
    assert {p.dtype for p in model.parameters()} == {stored}
    assert run(model).isfinite().all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64], ids=str)
def test_mixed_and_f64_files_become_f32(source, stored):
    """As in GGUF, where norms are f32 and matrices f16."""

    def edit(tensors):
        for name in tensors:
            if stored == torch.float64 or "norm" not in name:
                tensors[name] = tensors[name].to(stored)

    edit_weights(source, edit)
    model = memlm.load(source)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run(model).isfinite().all()


def test_tied_weights_are_one_parameter(tmp_path):
    tiny.llama(tmp_path, tie_word_embeddings=True)
    model = memlm.load(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    # Files of other tools may hold the head as well.
    edit_weights(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert torch.equal(run(memlm.load(tmp_path)), run(model))


def test_progress(source):
    seen = []
    memlm.load(source, progress=lambda done, total, name: seen.append((done, total, name)))
    assert [done for done, _, _ in seen] == list(range(1, seen[0][1] + 1))
    assert "layers.0.attention.qkv_proj.weight" in {name for _, _, name in seen}


def test_more_layers_than_tensors_are_not_built(source):
    tiny.edit_config(source, num_hidden_layers=4000)
    with pytest.raises(memlm.FormatError, match="4000 layers, but 21 tensors"):
        memlm.load(source)


def swap_rows(tensors):
    """q with v's rows and v with q's: together they have the right number."""
    q, v = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    tensors[q], tensors[v] = tensors[v], tensors[q]


BAD_TENSORS = {
    "missing": (lambda t: t.pop("model.norm.weight"), "has no tensor 'model.norm.weight'"),
    "unknown": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
                "tensor 'model.layers.0.self_attn.q_proj.bias' is not known"),
    "another layer": (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(64)}),
                      "layers.2.input_layernorm.weight' is not known"),
    "swapped": (swap_rows, r"q_proj.weight: got shape \[32, 64\], the config says \[64, 64\]"),
    "columns": (lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(32, 65)}),
                r"k_proj.weight: got shape \[32, 65\]"),
    "scalar": (lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}), r"got shape \[\]"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
                 "int32 is not a float type"),
}  # fmt: skip


@pytest.mark.parametrize("edit, message", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_checkpoints_that_do_not_fit_are_refused(source, edit, message):
    edit_weights(source, edit)
    with pytest.raises(memlm.FormatError, match=message):
        memlm.load(source)


def test_bad_paths_and_types(tmp_path, source):
    with pytest.raises(FileNotFoundError, match="no such"):
        memlm.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        (tmp_path / "empty").mkdir()
        memlm.load(tmp_path / "empty")
    with pytest.raises(TypeError, match="dtype: got torch.int8"):
        memlm.load(source, torch.int8)
    file = source / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(memlm.FormatError, match="safetensors"):
        memlm.load(source)


# --- packed folders ------------------------------------------------------------------------------

CONFIGS = {
    "float": None,
    "int4": memlm.QuantConfig("int4"),
    "int4 and embedding": memlm.QuantConfig("int4a-g64", "int8-g32", "int8", mode="accurate"),
    "int8": memlm.QuantConfig("int8", "int8", "int8"),
    "embedding only": memlm.QuantConfig(None, "int4"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_comes_back_as_it_was(tmp_path, tied, config, dtype):
    tiny.llama(tmp_path / "source", tie_word_embeddings=tied)
    model = memlm.load(tmp_path / "source", dtype)
    if config is not None:
        memlm.quantize_(model, config, strict=True)
    files = memlm.save(model, tmp_path / "packed")
    back = memlm.load(tmp_path / "packed")
    assert torch.equal(run(back), run(model))
    assert memlm.layer_specs(back) == memlm.layer_specs(model)
    assert {n: p.dtype for n, p in back.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    assert back.training is False
    assert sorted(files) == ["config.json", WEIGHTS]  # there is no tokenizer here
    assert files[WEIGHTS] == (tmp_path / "packed" / WEIGHTS).stat().st_size
    # Again from what was loaded: the same bytes.
    memlm.save(back, tmp_path / "again")
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


def test_an_encoder_and_biases_come_back_as_they_were(tmp_path):
    tiny.bert(tmp_path / "source")
    model = memlm.load(tmp_path / "source")
    memlm.quantize_(model, memlm.QuantConfig("int4", "int8"), strict=True)
    memlm.save(model, tmp_path / "packed")
    assert torch.equal(run(memlm.load(tmp_path / "packed")), run(model))


@pytest.mark.parametrize("keep", ["embed_tokens", "lm_head"])
def test_what_a_filter_left_alone_comes_back_as_it_was(tmp_path, keep):
    tiny.llama(tmp_path / "source", tie_word_embeddings=True)
    model = memlm.load(tmp_path / "source")
    config = memlm.QuantConfig("int8", "int8", "int8")
    memlm.quantize_(model, config, lambda module, name: name != keep)
    memlm.save(model, tmp_path / "packed")
    assert torch.equal(run(memlm.load(tmp_path / "packed")), run(model))


def test_every_tensor_is_stored_once(tmp_path):
    tiny.llama(tmp_path / "source", tie_word_embeddings=True)
    model = memlm.load(tmp_path / "source")
    memlm.save(model, tmp_path / "float")
    floats = sum(p.numel() for p in model.parameters()) * 4
    memlm.quantize_(model, memlm.QuantConfig("int8", "int8"))
    memlm.save(model, tmp_path / "packed")
    packed = memlm.explain(model).bytes
    for folder, size in (("float", floats), ("packed", packed)):
        stored = safetensors.torch.load_file(tmp_path / folder / WEIGHTS)
        assert sum(t.numel() * t.element_size() for t in stored.values()) == size
        assert not any(name.startswith("lm_head") for name in stored)
    back = memlm.load(tmp_path / "packed")
    assert back.lm_head.codes.data_ptr() == back.embed_tokens.codes.data_ptr()


def test_packed_weights_are_the_files_pages(source, tmp_path):
    model = memlm.quantize_(memlm.load(source), memlm.QuantConfig("int4", "int8", "int8"))
    memlm.save(model, tmp_path / "packed")
    back = memlm.load(tmp_path / "packed")
    run(back)
    ranges = list(mapped_ranges(tmp_path / "packed" / WEIGHTS))
    for name, tensor in back.state_dict().items():
        inside = any(start <= tensor.data_ptr() < end for start, end in ranges)
        assert inside, f"{name} was copied"
    assert file_mapping(tmp_path / "packed" / WEIGHTS).private == 0


def test_tokenizer_is_read_when_first_used_and_saved(source, tmp_path):
    (source / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    model = memlm.quantize_(memlm.load(source), "int4")
    files = memlm.save(model, tmp_path / "packed")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    back = memlm.load(tmp_path / "packed")
    text = "Thar she blows! 🐋"
    assert back.tokenizer.decode(back.tokenizer.encode(text)) == text
    assert back.tokenizer.eos_ids == model.tokenizer.eos_ids == [back.tokenizer.encode("!")[0]]
    (tmp_path / "packed" / "tokenizer.json").write_text("{")
    broken = memlm.load(tmp_path / "packed")  # not read yet
    with pytest.raises(memlm.FormatError, match="tokenizer.json"):
        broken.tokenizer.encode("x")


def test_deepcopy(source):
    model = memlm.quantize_(memlm.load(source), "int4")
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), run(model))
    assert twin.tokenizer.encode("ab") == model.tokenizer.encode("ab")


def test_dtype_of_a_packed_model(source, tmp_path):
    memlm.save(memlm.quantize_(memlm.load(source), "int4"), tmp_path / "packed")
    half = memlm.load(tmp_path / "packed", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    exact = run(memlm.load(tmp_path / "packed"))
    # bf16 keeps 8 bits; a few layers of it leave 2%.
    assert (run(half) - exact).norm() < 0.05 * exact.norm()


def test_other_tools_can_read_the_file(source, tmp_path):
    model = memlm.quantize_(memlm.load(source), "int4")
    memlm.save(model, tmp_path / "packed")
    with safetensors.safe_open(tmp_path / "packed" / WEIGHTS, "pt") as file:
        assert {**file.metadata(), "sha256": ""} == {
            "format": "memlm", "version": "2", "layout": "1", "sha256": ""}  # fmt: skip
        assert torch.equal(file.get_tensor("model.norm.weight"), model.norm.weight)
        codes = [file.get_tensor(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qkv"]
        assert torch.equal(torch.cat(codes), model.layers[1].attention.qkv_proj.codes)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "float32"
    assert config["quantization_config"]["quant_method"] == "memlm"


def test_fused_layers_are_mapped_as_one(tmp_path):
    """Query, key and value lie one behind the other in the file: one matrix, without a copy."""
    tiny.llama(tmp_path / "source", num_attention_heads=4, num_key_value_heads=2)
    memlm.save(memlm.quantize_(memlm.load(tmp_path / "source"), "int4"), tmp_path / "packed")
    model = memlm.load(tmp_path / "packed")
    storages = {b.untyped_storage().data_ptr() for n, b in model.named_buffers() if "codes" in n}
    assert len(storages) == 1
    memlm.save(memlm.load(tmp_path / "source"), tmp_path / "float")
    floats = memlm.load(tmp_path / "float").parameters()
    assert len({p.untyped_storage().data_ptr() for p in floats}) == 1
    rewritten = tmp_path / "again"
    memlm.save(model, rewritten)
    assert (rewritten / WEIGHTS).read_bytes() == (tmp_path / "packed" / WEIGHTS).read_bytes()


def test_projections_of_different_formats(source, tmp_path):
    """A layer that the decoder fuses is several ones where their formats differ."""
    memlm.save(memlm.quantize_(memlm.load(source), "int4"), tmp_path / "packed")
    theirs = LlamaForCausalLM.from_pretrained(source)
    targets = {"re:.*v_proj": "int8", "re:.*up_proj": None}
    memlm.quantize_(theirs, memlm.QuantConfig("int4", targets=targets))
    tensors, specs = {}, memlm.layer_specs(theirs)
    for name, tensor in theirs.state_dict().items():
        module, _, part = name.rpartition(".")
        tensors[f"{module}.{'weight' if part == 'codes' else part}"] = tensor
    safetensors.torch.save_file(tensors, tmp_path / "packed" / WEIGHTS)
    edit_quantization(tmp_path / "packed", lambda q: q.update(layers=specs))
    model = memlm.load(tmp_path / "packed")
    assert type(model.layers[0].attention.qkv_proj).__name__ == "Stacked"
    torch.testing.assert_close(run(model), tiny.logits(theirs, IDS), rtol=1e-4, atol=1e-4)
    memlm.save(model, tmp_path / "again")
    assert torch.equal(run(memlm.load(tmp_path / "again")), run(model))


PAGES = """
import sys, torch, memlm
from memlm.memory import file_mapping
model = memlm.load(sys.argv[1], pages=sys.argv[2])
m = file_mapping(sys.argv[1] + "/model.safetensors")
with torch.inference_mode():
    print(m.size, m.resident, m.private, model(torch.arange(60).view(2, 30)).double().sum().item())
"""


@pytest.mark.parametrize("pages", ["mapped", "populated", "huge"])
def test_pages(tmp_path, pages):
    """Where the weights lie, by the kernel's account; what they compute is the same."""
    tiny.llama(tmp_path / "source", hidden_size=512)
    folder = tmp_path / "packed"
    memlm.quantize_files(tmp_path / "source", folder, memlm.QuantConfig("int8", "int8", "int8"))
    done = subprocess.run(
        [sys.executable, "-c", PAGES, str(folder), pages],
        capture_output=True,
        text=True,
        check=True,
    )
    mapped, resident, private, total = map(float, done.stdout.split())
    size = (folder / WEIGHTS).stat().st_size
    assert size > 1e6 and private == 0
    assert mapped == 0 if pages == "huge" else mapped >= size
    assert resident == mapped if pages == "populated" else resident < size
    assert total == run(memlm.load(folder)).double().sum().item()
    with pytest.raises(ValueError, match="pages: got 'small', accepted are"):
        memlm.load(folder, pages="small")


# --- where save writes ---------------------------------------------------------------------------


def test_saving_over_a_packed_model_keeps_other_files(source, tmp_path):
    target = tmp_path / "deep" / "packed"
    memlm.save(memlm.quantize_(memlm.load(source), "int8"), target)
    (target / "README").write_text("mine")
    model = memlm.quantize_(memlm.load(source), "int4")
    memlm.save(model, target)
    assert (target / "README").read_text() == "mine"
    assert torch.equal(run(memlm.load(target)), run(model))
    assert not any(name.startswith(".") for name in os.listdir(target))


def test_saving_to_the_folder_that_is_mapped(source, tmp_path):
    memlm.save(memlm.quantize_(memlm.load(source), "int8"), tmp_path / "packed")
    model = memlm.load(tmp_path / "packed")
    before = run(model)
    memlm.save(model, tmp_path / "packed")
    assert torch.equal(run(model), before)
    assert torch.equal(run(memlm.load(tmp_path / "packed")), before)


def test_originals_are_never_overwritten(source, tmp_path):
    model = memlm.quantize_(memlm.load(source), "int8")
    before = {f.name: f.read_bytes() for f in source.iterdir()}
    with pytest.raises(FileExistsError, match="something else than a packed memlm model"):
        memlm.save(model, source)
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is no folder"):
        memlm.save(model, tmp_path / "file")


def test_a_save_that_fails_leaves_nothing_behind(source, tmp_path, monkeypatch):
    model = memlm.quantize_(memlm.load(source), "int8")
    memlm.save(model, tmp_path / "old")
    before = {f.name: f.read_bytes() for f in (tmp_path / "old").iterdir()}
    other = memlm.quantize_(memlm.load(source), "int4")
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    for target in ("old", "new"):
        with pytest.raises(ZeroDivisionError):
            memlm.save(other, tmp_path / target)
    assert not (tmp_path / "new").exists()
    assert {f.name: f.read_bytes() for f in (tmp_path / "old").iterdir()} == before


def test_only_loaded_models_are_saved(tmp_path):
    for model in (torch.nn.Linear(2, 2), LlamaForCausalLM(LlamaConfig(**tiny.SIZES))):
        with pytest.raises(TypeError, match="model: got .* expected what memlm.load returned"):
            memlm.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- packed folders that are wrong ---------------------------------------------------------------


@pytest.fixture
def packed(source, tmp_path):
    folder = tmp_path / "packed"
    memlm.save(memlm.quantize_(memlm.load(source), memlm.QuantConfig("int4", "int8")), folder)
    return folder


def edit_quantization(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"
BAD_CONFIGS = {
    "method": (lambda q: q.update(quant_method="fp8"), "quant_method 'fp8' is not read here"),
    "version": (lambda q: q.update(version=99), "version 99; known is 2"),
    "no layers": (lambda q: q.pop("layers"), "layers is missing"),
    "list": (lambda q: q.update(layers=[]), "layers is missing or malformed"),
    "spec": (lambda q: q["layers"].update({Q: None}), "malformed"),
    "format": (lambda q: q["layers"][Q].update(format="int3"), "malformed"),
    "size": (lambda q: q["layers"][Q].update(n=10**18), Q),
    "negative": (lambda q: q["layers"][Q].update(k=-1), Q),
    "unknown layer": (lambda q: q["layers"].update({"layers.9.x": q["layers"][Q]}), "layers.9.x"),
    "root": (lambda q: q["layers"].update({"": q["layers"][Q]}), "not known"),
    "left out": (lambda q: q["layers"].pop(Q), Q),
    "tied to nobody": (lambda q: q["layers"][Q].update(tied_to="x"), Q),
    "tied to a list": (lambda q: q["layers"][Q].update(tied_to=[]), Q),
    "group": (lambda q: q["layers"][Q].update(format="int4-g64"), Q),
    "bits": (lambda q: q["layers"][Q].update(format="int8"), Q),
    "offsets": (lambda q: q["layers"][Q].update(format="int4-g32"), Q),
    "type": (lambda q: q["layers"][Q].update(type="Conv"), Q),
    "mode": (lambda q: q["layers"][Q].update(mode="w8a8"), Q),
    "order": (lambda q: q["layers"][Q].update(order=True), Q),
    "bias": (lambda q: q["layers"][Q].update(bias=True), Q),
}


@pytest.mark.parametrize("edit, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_packed_configs_that_are_wrong_are_refused(packed, edit, message):
    edit_quantization(packed, edit)
    with pytest.raises(memlm.FormatError, match=message):
        memlm.load(packed)


@pytest.mark.parametrize("value", ["memlm", 1, [], {}, {"quant_method": None}], ids=str)
def test_quantization_config_of_another_kind_is_refused(packed, value):
    tiny.edit_config(packed, quantization_config=value)
    with pytest.raises(memlm.FormatError, match="quant_method .* is not read here"):
        memlm.load(packed)


BAD_STATE = {
    "missing": (lambda t: t.pop(f"{Q}.scales"), f"{Q}.*scales"),
    "extra": (lambda t: t.update({"more": torch.zeros(3)}), "more"),
    "short": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1].clone()}), Q),
    "dtype of codes": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].short()}), Q),
    "dtype of scales": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}), Q),
    "integer norm": (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
                     "norm.weight: torch.int64"),
    "norm's shape": (lambda t: t.update({"norm.weight": torch.ones(65)}), "norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("edit, message", BAD_STATE.values(), ids=BAD_STATE)
def test_packed_weights_that_do_not_fit_are_refused(packed, edit, message):
    edit_weights(packed, edit)
    with pytest.raises(memlm.FormatError, match=message):
        memlm.load(packed)


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.models
def test_smollm2_packed_takes_no_private_memory(tmp_path):
    """In a fresh process: after a forward pass every byte of the weights is the page cache's."""
    model = memlm.load(data.smollm2_gguf(), dequantize=True)
    memlm.quantize_(model, memlm.QuantConfig("int8", "int8"), strict=True)
    memlm.save(model, tmp_path / "packed")
    script = (
        "import sys, torch, memlm; from memlm.memory import file_mapping\n"
        "model = memlm.load(sys.argv[1])\n"
        "assert 'torch._dynamo' not in sys.modules  # takes a second to import\n"
        "with torch.inference_mode(): model(torch.arange(64)[None])\n"
        "m = file_mapping(sys.argv[1] + '/model.safetensors')\n"
        "print(m.size, m.resident, m.private)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "packed")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    size, resident, private = map(int, done.stdout.split())
    assert private == 0
    assert size >= (tmp_path / "packed" / WEIGHTS).stat().st_size > 130e6
    assert resident > 0.9 * size
