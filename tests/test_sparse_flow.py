"""Pruned models from files and back: packed folders, decoders and their caches, transformers, PEFT;
what is mapped, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import memlm
from memlm import FormatError, QuantConfig
from memlm.layers import Linear, SparseLinear
from memlm.models.generate import generate

from . import tiny
from .sparse import prune_
from .test_cli import run as command
from .test_cli import run_json
from .test_load import mapped_ranges, run
from .test_sparse_linear import FORMATS

IDS = torch.arange(24).view(2, 12)
WEIGHTS = "model.safetensors"


def source(folder, format, **settings):
    """A float model with zeros, in transformers' hands; its folder has the same weights."""
    model = prune_(tiny.llama(folder, **settings), format)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FORMATS)
def packed(request, tmp_path_factory):
    """A format, memlm's model in it, and its folder, beside which the float model lies."""
    folder = tmp_path_factory.mktemp("model")
    source(folder / "float", request.param, tie_word_embeddings=True)
    tiny.tokenizer(folder / "float")
    model = memlm.load(folder / "float")
    memlm.sparsify_(model, QuantConfig(request.param, "int8"), strict=True)
    memlm.save(model, folder / "packed")
    return request.param, model, folder / "packed"


def test_a_saved_model_comes_back_as_it_was(packed, tmp_path):
    format, model, folder = packed
    back = memlm.load(folder)
    sparse = [m for m in back.modules() if type(m) is SparseLinear]
    assert len(sparse) == 4 * 2 and {m.format.name for m in sparse} == {format}
    assert torch.equal(run(back), run(model))
    assert memlm.layer_specs(back) == memlm.layer_specs(model)
    memlm.save(back, tmp_path / "again")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    ids = model.tokenizer.encode("Call me Ishmael")
    assert list(generate(back, ids, 5)) == list(generate(model, ids, 5))


def test_from_files_to_files(packed, tmp_path):
    format, model, folder = packed
    memlm.quantize_files(folder.parent / "float", tmp_path / "files", QuantConfig(format, "int8"))
    assert torch.equal(run(memlm.load(tmp_path / "files")), run(model))
    again = memlm.load(tmp_path / "files")
    memlm.quantize_files(folder, tmp_path / "packed", "int8")  # what is packed stays as it is
    assert torch.equal(run(memlm.load(tmp_path / "packed")), run(again))
    rounded = memlm.load(folder, dequantize=True)
    assert not any(isinstance(m, (Linear, SparseLinear)) for m in rounded.modules())
    model = memlm.dequantize_(memlm.load(folder))
    torch.testing.assert_close(run(rounded), run(model))


def test_matrices_without_zeros_stay_floats(tmp_path):
    tiny.llama(tmp_path / "float", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="7 matrices, .*q_proj.weight the first, have no zeros"):
        memlm.quantize_files(tmp_path / "float", tmp_path / "packed", "block/int4")
    assert torch.equal(run(memlm.load(tmp_path / "packed")), run(memlm.load(tmp_path / "float")))


def test_layers_as_one_call(packed):
    """The library's decoder layers and Python's are the same, with any cache."""
    _, model, _ = packed
    for kv in ("f32", "int4"):
        with torch.inference_mode():
            native = model(IDS, model.new_cache(kv))
        assert model._native is not None
        python = model(IDS, model.new_cache(kv))  # gradients are asked for: layer by layer
        assert python.requires_grad
        # Few numbers of x are rounded to another of 8 bits where sums differ in their last bits.
        rounds = kv != "f32" or model.layers[0].mlp.down_proj.mode == "fast"
        assert (native - python).norm() < (0.02 if rounds else 1e-5) * native.norm()


def test_weights_are_the_files_pages(packed):
    """But for starts, which are counted anew, and, of fused layers, codes of bitmaps, which end in
    spare bytes."""
    format, _, folder = packed
    model = memlm.load(folder)
    ranges = list(mapped_ranges(folder / WEIGHTS))
    for name, tensor in model.state_dict().items():
        inside = any(start <= tensor.data_ptr() < end for start, end in ranges)
        joined = ("qkv" in name or "gate_up" in name) and name.rpartition(".")[2]
        copied = joined == "codes" and "unstructured" in format
        assert inside or name.endswith("starts") or copied, name
    explanation = memlm.explain(model)
    files = sum(t.nbytes for t in load_file(folder / WEIGHTS).values())
    # starts of fused layers have one number for two, and one end of codes where there were several
    assert abs(explanation.bytes - files) <= 4 * 2 * (2 * 8 + 2 * 64)


def test_through_transformers(packed, tmp_path):
    format, model, folder = packed
    back, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(back.model.layers[0].mlp.up_proj) is SparseLinear
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(tiny.logits(back, IDS), run_ids(model), **close)
    back.save_pretrained(tmp_path / "again")
    assert load_equal(tmp_path / "again", folder)
    quantised = AutoModelForCausalLM.from_pretrained(
        folder.parent / "float",
        quantization_config=memlm.hf.MemlmConfig(linear=format, embedding="int8"),
    )
    torch.testing.assert_close(tiny.logits(quantised, IDS), run_ids(model), **close)
    memlm.hf.fuse_layers(back)
    cache = memlm.hf.PagedCache(back.config, "f32")
    with torch.inference_mode():
        fused = back(IDS, cache=cache).logits
        torch.testing.assert_close(fused, model(IDS, model.new_cache("f32")), **close)
    assert back.model.layers[0]._native is not None


def run_ids(model):
    with torch.inference_mode():
        return model(IDS)


def load_equal(a, b) -> bool:
    one, other = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_sparse_and_dense_layers_in_one_model(tmp_path):
    source(tmp_path / "float", "block/int4")
    model = memlm.load(tmp_path / "float")
    config = QuantConfig(
        "block/int4", "int8", "int4-g64",
        targets={"re:.*attention": "int4", "re:layers.1.*gate_up": "unstructured/int4-g64"},
    )  # fmt: skip
    memlm.sparsify_(model, config, strict=True)
    first, second = model.layers
    assert type(first.attention.qkv_proj) is Linear and type(first.mlp.down_proj) is SparseLinear
    assert second.mlp.gate_up_proj.format.name == "unstructured/int4-g64"
    with torch.inference_mode():
        y = model(IDS, model.new_cache("int4"))
    assert model._native is not None
    memlm.save(model, tmp_path / "packed")
    back = memlm.load(tmp_path / "packed")
    with torch.inference_mode():
        assert torch.equal(back(IDS, back.new_cache("int4")), y)
    # Query and key sparse, value dense: layers of several formats where one is wanted.
    memlm.quantize_files(tmp_path / "float", tmp_path / "mixed",
                         QuantConfig("block/int4", targets={"re:.*v_proj": "int4"}))  # fmt: skip
    mixed = memlm.load(tmp_path / "mixed")
    kinds = [type(m) for m in mixed.layers[0].attention.qkv_proj.layers]
    assert kinds == [SparseLinear, SparseLinear, Linear]
    assert run(mixed).isfinite().all()


@pytest.mark.parametrize("format", ["block/f32", "block/int4", "2:4/int4", "unstructured/int4"])
def test_layers_of_zeros_alone(tmp_path, format):
    model = tiny.llama(tmp_path / "float")
    for layer in model.model.layers:
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            nn.init.zeros_(module.weight)
    model.save_pretrained(tmp_path / "float")
    expected = tiny.logits(model, IDS)
    model = memlm.load(tmp_path / "float")
    memlm.sparsify_(model, format)
    memlm.save(model, tmp_path / "packed")
    back = memlm.load(tmp_path / "packed")
    specs = memlm.layer_specs(back)
    assert len(specs) == 4 and not any("tied_to" in spec for spec in specs.values())
    assert all(row.reason == "" for row in memlm.explain(back).rows if row.format == format)
    with torch.inference_mode():
        y = back(IDS, back.new_cache("f32"))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(tiny.logits(theirs, IDS), expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    assert load_equal(tmp_path / "again", tmp_path / "packed")


def test_an_encoder_with_biases(tmp_path):
    model = prune_(tiny.bert(tmp_path / "float"), "2:4/int4")
    model.save_pretrained(tmp_path / "float")
    model = memlm.sparsify_(memlm.load(tmp_path / "float"), "2:4/int4", strict=False)
    assert type(model.layers[0].qkv_proj) is SparseLinear
    memlm.save(model, tmp_path / "packed")
    assert torch.equal(run(memlm.load(tmp_path / "packed")), run(model))


def test_adapters(packed):
    from peft import LoraConfig, get_peft_model

    format, _, folder = packed
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.shape[0] == 8 or p.shape[1] == 8 for p in trained)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_compiled(tmp_path):
    source(tmp_path / "float", "block/f32", num_hidden_layers=1)
    config = QuantConfig("block/f32", targets={"re:.*mlp": "block/int4"})
    memlm.quantize_files(tmp_path / "float", tmp_path / "packed", config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expected = tiny.logits(model, IDS)
    torch.testing.assert_close(tiny.logits(torch.compile(model, backend="eager"), IDS), expected)


# --- files that lie --------------------------------------------------------------------------------


def change_spec(**changes):
    def change(specs, tensors):
        specs["model.layers.0.mlp.down_proj"] |= changes

    return change


def change_tensor(part, edit):
    def change(specs, tensors):
        name = f"model.layers.0.mlp.down_proj.{part}"
        tensors[name] = edit(tensors[name].clone())

    return change


def drop(part):
    return lambda specs, tensors: tensors.pop(f"model.layers.0.mlp.down_proj.{part}")


def filled(value, at=0):
    def edit(tensor):
        tensor.view(-1)[at] = value
        return tensor

    return edit


# What is changed -> format, message.
LIES = {
    "offsets": ("block/int4-g32", change_spec(format="block/int4a-g32"), "got tensors"),
    "format": ("block/int4", change_spec(format="2:3/int4"), "2:3/int4"),
    "dense": ("2:4/int4", change_spec(format="int4-g32"), "malformed"),
    "rows": ("block/int4", change_spec(n=80), "starts: got|got shape"),
    "no scale type": ("block/int4", change_spec(scale_dtype=None), "scale_dtype None"),
    "mode": ("block/int8-g32", change_spec(mode="w8a8"), "mode: got 'w8a8'"),
    "order": ("block/int4", change_spec(order=True), "order True"),
    "no places": ("2:4/int4", drop("places"), "got tensors"),
    "no starts": ("block/f32", drop("starts"), "got tensors"),
    "no codes": ("block/f32", drop("weight"), "malformed: .*codes"),
    "place too large": ("block/int4", change_tensor("places", filled(4)), "places: got"),
    "place negative": ("block/f32", change_tensor("places", filled(-1)), "places: got"),
    "place twice": ("block/int4", change_tensor("places", lambda t: t * 0), "places: must ascend"),
    "places too few": ("block/int4", change_tensor("places", lambda t: t[1:]), "starts|codes"),
    "starts descend": ("block/int4", change_tensor("starts", filled(10**9, 1)), "starts: must"),
    "starts beyond": ("unstructured/int4", change_tensor("starts", filled(2**62, -1)), "starts: must"),
    "starts short": ("unstructured/int4", change_tensor("starts", lambda t: t[1:]), "starts: got"),
    "bits beyond codes": ("unstructured/int4", change_tensor("places", filled(255)), "starts: must"),
    "codes cut": ("unstructured/int4", change_tensor("weight", lambda t: t[64:]), "codes: got"),
    "no codes at all": ("unstructured/int4", change_tensor("weight", lambda t: t[:0]), "codes: got"),
    "pairs": ("2:4/int4", change_tensor("places", filled(0)), "places: must have p0 < p1"),
    "places wide": ("2:4/int4", change_tensor("places", lambda t: t.int()), "places: got torch.int32"),
    "values": ("block/f32", change_tensor("weight", lambda t: t.double()), "codes: got torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("format, change, message", LIES.values(), ids=LIES)
def test_folders_that_lie_are_refused(tmp_path, format, change, message):
    source(tmp_path / "float", format, num_hidden_layers=1)
    folder = tmp_path / "packed"
    memlm.quantize_files(tmp_path / "float", folder, QuantConfig(format))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
    change(config["quantization_config"]["layers"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(FormatError, match=message):
        memlm.load(folder)
    with pytest.raises((FormatError, ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_specs_of_layers_that_cannot_be(tmp_path):
    source(tmp_path, "block/int4")
    model = memlm.sparsify_(memlm.load(tmp_path), "block/int4")
    specs, name = memlm.layer_specs(model), "layers.0.mlp.down_proj"
    assert specs[name]["stored"] == len(model.layers[0].mlp.down_proj.places)
    for change, message in (
        ({"stored": -1}, "stored: got -1, accepted for block/int4a-g32 are 0 to 16"),
        ({"stored": 17}, "stored: got 17"),
        ({"stored": True}, "stored: got True"),
        ({"stored": None}, "stored: got None"),
        ({"type": "Embedding"}, "but the model has Linear 64x112"),
    ):
        with pytest.raises(ValueError, match=message):
            memlm.build_layers_(memlm.load(tmp_path), {name: specs[name] | change})
    with pytest.raises(ValueError, match="layers: embed_tokens: malformed spec: format block/int4a"):
        embedding = {**specs[name], "type": "Embedding", "n": 256, "k": 64}
        memlm.build_layers_(memlm.load(tmp_path), {"embed_tokens": embedding})
    rebuilt = memlm.build_layers_(memlm.load(tmp_path), specs)
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(rebuilt), run(model))


# --- the command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 8)
    return file


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama(folder, tie_word_embeddings=True)
    tiny.tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "method, pattern, format, stored",
    [("sparsegpt", "block", "int4", "block/int4a-g32"), ("wanda", "2:4", "nf4", "2:4/nf4-g64"),
     ("magnitude", "unstructured", "int4", "unstructured/int4-g32"),
     ("magnitude", "block", "f32", "block/f32")],
)  # fmt: skip
def test_prune_and_what_comes_after(dense, text, tmp_path, method, pattern, format, stored):
    dst = tmp_path / "pruned"
    options = ("--method", method, "--pattern", pattern, "--format", format, "--calibration", text)
    result = run_json("prune", dense, dst, *options, "--length", "64", "--ignore", "re:.*o_proj")
    assert result["disk_bytes"] == (dst / WEIGHTS).stat().st_size and result["method"] == method
    assert len(result["layers"]) == 2 * 3 and set(result["left"]) == {
        "layers.0.attention.o_proj", "layers.1.attention.o_proj", "lm_head"}  # fmt: skip
    assert 0.45 < result["sparsity"] < 0.6
    model = memlm.load(dst)
    formats = {type(m): m.format.name for n, m in model.named_modules() if n.endswith("down_proj")}
    assert formats == {SparseLinear: stored}
    others = {"int4": Linear, "nf4": Linear, "f32": nn.Linear}
    assert type(model.layers[0].attention.o_proj) is others[format]
    assert model.embed_tokens.format.name == "int8-g32"
    rows = run_json("info", dst)["rows"]
    assert {row["format"] for row in rows if row["type"] == "SparseLinear"} == {stored}
    assert sum(row["bytes"] for row in result["layers"]) == sum(
        row["bytes"] for row in rows if row["type"] == "SparseLinear"
    )
    assert run_json("generate", dst, "Call me", "--max-tokens", "3")["tokens"] <= 3
    score = ("eval", dst, "--base", dense, "--text", text, "--window", "32", "--tokens", "128")
    assert 0 < run_json(*score, "--kv", "int4")["kl"] < 5
    assert run_json("bench", dst)["decode_tps"] > 0


def test_what_pruning_prints(dense, text, tmp_path):
    options = ("--sparsity", "0.1", "--method", "magnitude", "--calibration", text, "--length", "64")
    lines = command("prune", dense, tmp_path / "pruned", *options).splitlines()
    assert any(line.startswith("layers.1.mlp.down_proj") and "10.0%" in line for line in lines)
    assert any("bytes more than dense: with so few zeros, unstructured saves" in x for x in lines)
    assert "% of f32" in " ".join(" ".join(lines).split())
    with pytest.raises(ValueError, match="--block '16': expected ROWSxCOLUMNS"):
        command("prune", dense, tmp_path / "x", "--block", "16", "--pattern", "block")
    with pytest.raises(ValueError, match="--target 'x': expected PATTERN=SPARSITY"):
        command("prune", dense, tmp_path / "x", "--target", "x")
    with pytest.raises(FileExistsError, match="holds something else"):
        command("prune", dense, dense)
    assert not (tmp_path / "x").exists()
