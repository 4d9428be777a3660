"""memlm.export: other programs read what it writes, and compute the same."""

import shutil

import gguf
import pytest
import torch
from transformers import AutoModel, LlamaForCausalLM

import memlm
from memlm.export import export
from memlm.io.checkpoint import open_checkpoint
from memlm.io.gguf import GGUF

from . import tiny, tiny_gguf
from .sparse import prune_

IDS = torch.arange(60).view(2, 30)


def run(model):
    with torch.inference_mode():
        return model(IDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Widths that are whole blocks of 32; a tokenizer as SmolLM2's."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny.llama(folder, intermediate_size=128)
    tiny_gguf.write_llama(folder / "model.gguf", model)
    memlm.load(folder / "model.gguf").tokenizer.save(folder)
    return folder


def packed(source, folder, config):
    memlm.quantize_files(source, folder, config)
    return folder


@pytest.mark.parametrize("to, dtype", [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_floats(source, tmp_path, to, dtype):
    folder = packed(source, tmp_path / "packed", memlm.QuantConfig("int4", "int8", "int8"))
    result = export(folder, tmp_path / "out", to)
    assert set(result["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype and "quantization_config" not in vars(theirs.config)
    ours = memlm.load(folder, dequantize=True)
    # int8's scales times codes have 18 bits: bf16 holds 8
    assert bool(result["rounded"]) is (to == "bf16")
    expected = run(ours if to == "f32" else ours.to(dtype))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if to == "f32" else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(tiny.logits(theirs, IDS).float(), expected, **tolerance)


def test_bert(tmp_path):
    tiny.bert(tmp_path / "source")
    memlm.quantize_files(
        tmp_path / "source", tmp_path / "packed", memlm.QuantConfig("int8", "int8")
    )
    export(tmp_path / "packed", tmp_path / "out", "f32")
    with torch.inference_mode():
        theirs = AutoModel.from_pretrained(tmp_path / "out")(IDS).last_hidden_state
    expected = run(memlm.load(tmp_path / "packed", dequantize=True))
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


KINDS = {
    "int4-g32": "Q4_0", "int4-g64": "Q4_0", "int4a-g32": "Q4_1", "int4a-g128": "Q4_1",
    "int8-g32": "Q8_0", "int8-g64": "Q8_0", "int8-row": "Q8_0", "ternary-g64": "Q4_0",
    "int2-g32": "Q4_0", "int2a-g32": "Q4_1", "nf4-g64": "F16",
}  # fmt: skip


@pytest.mark.parametrize("format, kind", KINDS.items())
def test_gguf_holds_the_same_numbers(source, tmp_path, format, kind):
    folder = packed(source, tmp_path / "packed", memlm.QuantConfig(format, "int8", "int8"))
    result = export(folder, tmp_path / "model.gguf", "gguf")
    assert bool(result["rounded"]) is (kind == "F16")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == kind
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    # The library's own reading, without the order of q and k; then ours, with it.
    for name in ("ffn_down", "attn_v"):
        tensor = tensors[f"blk.0.{name}.weight"]
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        part = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}[name]
        mine = open_checkpoint(folder).tensor(f"model.layers.0.{part}.weight")
        assert torch.equal(theirs, mine.half().float() if kind == "F16" else mine)
    ours, back = memlm.load(folder), memlm.load(tmp_path / "model.gguf")
    assert back.tokenizer.encode("the th") == ours.tokenizer.encode("the th")
    if kind != "F16":
        floats = [memlm.load(f, dequantize=True) for f in (folder, tmp_path / "model.gguf")]
        assert torch.equal(*map(run, floats))


def test_gguf_comes_back_byte_for_byte(tmp_path):
    theirs = tiny.llama(tmp_path / "hf", intermediate_size=128)
    kinds = [tiny_gguf.Type[name] for name in ("Q4_1", "Q8_0", "Q4_0", "F16")]
    stored = tiny_gguf.write_llama(tmp_path / "a.gguf", theirs, kinds)
    memlm.quantize_files(tmp_path / "a.gguf", tmp_path / "packed", memlm.QuantConfig(None))
    export(tmp_path / "packed", tmp_path / "b.gguf", "gguf")
    a, b = (GGUF(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert a.tensors.keys() == b.tensors.keys() and len(stored) == len(a.tensors)
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        assert (tensor.type, tensor.shape) == (other.type, other.shape)
        raw = [f._bytes[t.offset : t.end] for f, t in ((a, tensor), (b, other))]
        assert torch.equal(*raw), name
    assert a.config == b.config


def test_llama_cpp_says_the_same(source, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = packed(source, tmp_path / "packed", memlm.QuantConfig("int4", "int8", "int8"))
    export(folder, tmp_path / "model.gguf", "gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False, logits_all=True)
    theirs.eval(IDS[0].tolist())
    ours = memlm.load(folder, dequantize=True)
    scores = torch.from_numpy(theirs.scores[:30]).clone()
    # llama.cpp rounds activations to 8 bits.
    assert torch.nn.functional.cosine_similarity(scores, run(ours)[0], dim=-1).min() > 0.99


def test_compressed_tensors(source, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    config = memlm.QuantConfig("int4-g64", "int8", targets={"re:.*v_proj": "int8-row"})
    folder = packed(source, tmp_path / "packed", config)
    export(folder, tmp_path / "out", "compressed-tensors")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    expected = run(memlm.load(folder, dequantize=True))
    torch.testing.assert_close(tiny.logits(theirs, IDS), expected, rtol=1e-4, atol=1e-4)
    back = memlm.load(tmp_path / "out")
    pairs = list(zip(memlm.load(folder).layers, back.layers))
    for ours, again in pairs:
        for name in ("attention.qkv_proj.layers.0", "attention.qkv_proj.layers.2", "mlp.down_proj"):
            a, b = ours.get_submodule(name), again.get_submodule(name)
            assert a.format.bits == b.format.bits and torch.equal(
                a.weight.clone(), b.weight.clone()
            )
    folder = packed(source, tmp_path / "asymmetric", "int4")
    with pytest.raises(ValueError, match="offsets that are no integer zero points"):
        export(folder, tmp_path / "no", "compressed-tensors")
    assert not (tmp_path / "no").exists()


def test_refusals(source, tmp_path):
    for to, error, match in [
        ("int8", ValueError, "to: got 'int8', accepted are"),
        ("gguf", memlm.FormatError, "model_type 'bert'; written are llama and mistral"),
    ]:
        tiny.bert(tmp_path / to)
        with pytest.raises(error, match=match):
            export(tmp_path / to, tmp_path / "out", to)
    with pytest.raises(FileExistsError):
        export(source, tmp_path, "f32")
    tiny.tokenizer(source)  # splits as gpt-2 does
    export(source, tmp_path / "gpt2.gguf", "gguf")
    assert GGUF(tmp_path / "gpt2.gguf").metadata["tokenizer.ggml.pre"] == "gpt-2"
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        export(tmp_path / "bare", tmp_path / "none.gguf", "gguf")
    assert not (tmp_path / "none.gguf").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("format", ["block/int4-g32", "block/f32", "2:4/int4", "unstructured/nf4-g64"])
def test_sparse_matrices_are_written_with_their_zeros(source, tmp_path, format):
    pruned = tmp_path / "float"
    prune_(LlamaForCausalLM.from_pretrained(source), format).save_pretrained(pruned)
    shutil.copy(source / "tokenizer.json", pruned)
    folder = packed(pruned, tmp_path / "packed", memlm.QuantConfig(format))
    expected = memlm.load(folder, dequantize=True).state_dict()
    for to in ("f32", "gguf", "compressed-tensors"):
        if to == "compressed-tensors" and "nf4" in format:
            continue  # which it does not hold, sparse or not
        result = export(folder, tmp_path / to, to)
        nf4 = to == "gguf" and "nf4" in format
        assert len(result["rounded"]) == (2 * 7 if nf4 else 0)
        found = memlm.load(tmp_path / to, dequantize=True).state_dict()
        for name, tensor in expected.items():
            if nf4 and "proj" in name:
                tensor = tensor.half().float()
            assert torch.equal(found[name].float(), tensor), name
        assert (found["layers.0.mlp.down_proj.weight"] == 0).float().mean() > 0.25
