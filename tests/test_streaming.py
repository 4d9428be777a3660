"""quantize_files: the same bytes as in memory, tensor by tensor; killed and taken up again."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, LlamaForCausalLM

import memlm
from memlm import data, quantize, streaming
from memlm.io import safetensors
from memlm.models.decoder import Decoder

from . import tiny, tiny_gguf

WEIGHTS = "model.safetensors"
IDS = torch.arange(60).view(2, 30)


def run(model):
    with torch.inference_mode():
        return model(IDS)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny.llama(folder, tie_word_embeddings=True)
    tiny.tokenizer(folder)
    return folder


def in_memory(source, config, folder, **settings):
    memlm.save(memlm.quantize_(memlm.load(source, **settings), config), folder)
    return folder


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        memlm.QuantConfig("int4", "int8", "int8"), memlm.QuantConfig("int8-row"),
        memlm.QuantConfig("nf4", "int4", mode="accurate"),
    ],
    ids=["int4", "head in floats", "nf4"],
)  # fmt: skip
def test_as_in_memory(tmp_path, tied, config):
    """The same file, byte for byte, as quantising the loaded model and saving it."""
    tiny.llama(tmp_path / "source", tie_word_embeddings=tied)
    files = memlm.quantize_files(tmp_path / "source", tmp_path / "files", config)
    in_memory(tmp_path / "source", config, tmp_path / "memory")
    ours, wanted = files_of(tmp_path / "files"), files_of(tmp_path / "memory")
    assert ours[WEIGHTS] == wanted[WEIGHTS] and len(ours[WEIGHTS]) == files[WEIGHTS]
    both = [json.loads(f["config.json"]) for f in (ours, wanted)]
    assert both[0]["quantization_config"] == both[1]["quantization_config"]
    assert torch.equal(run(memlm.load(tmp_path / "files")), run(memlm.load(tmp_path / "memory")))


def test_sharded_bf16_and_other_files(tmp_path):
    model = tiny.llama(tmp_path / "whole").bfloat16()
    model.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    (tmp_path / "source" / "1_Pooling").mkdir()
    (tmp_path / "source" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "source" / "pytorch_model.bin").write_text("a pickle")
    files = memlm.quantize_files(tmp_path / "source", tmp_path / "packed", "int8")
    names = files_of(tmp_path / "packed").keys()
    assert {"config.json", WEIGHTS, "generation_config.json", "1_Pooling/config.json"} == names
    assert set(files) >= {"config.json", WEIGHTS}
    packed = memlm.load(tmp_path / "packed")
    assert packed.norm.weight.dtype == packed.embed_tokens.weight.dtype == torch.bfloat16
    expected = in_memory(tmp_path / "source", "int8", tmp_path / "memory")
    assert torch.equal(run(packed), run(memlm.load(expected)))


@pytest.mark.parametrize("cls", [BertModel, BertForSequenceClassification])
def test_bert(tmp_path, cls):
    """With what the encoder here does not use: transformers finds its pooler and head."""
    theirs = tiny.bert(tmp_path / "source", cls)
    config = memlm.QuantConfig("int8", "int8")
    memlm.quantize_files(tmp_path / "source", tmp_path / "packed", config)
    names = set(safetensors.open_mapped(tmp_path / "packed" / WEIGHTS)[0])
    assert names >= set(theirs.state_dict()) - {"embeddings.position_ids"}
    back, report = cls.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    rest = [
        name for name, _ in theirs.named_parameters() if "pooler" in name or "classifier" in name
    ]
    assert rest and all(
        type(back.get_submodule(n.rpartition(".")[0])) is torch.nn.Linear for n in rest
    )
    layers = [name.removesuffix(".weight") for name in rest if name.endswith("weight")]
    memlm.quantize_(theirs, memlm.QuantConfig("int8", "int8", ignore=layers))
    with torch.inference_mode():
        torch.testing.assert_close(back(IDS)[-1], theirs(IDS)[-1], rtol=1e-4, atol=1e-4)
    expected = in_memory(tmp_path / "source", config, tmp_path / "memory")
    assert torch.equal(run(memlm.load(tmp_path / "packed")), run(memlm.load(expected)))


def test_patterns_are_those_of_hugging_face(source, tmp_path):
    config = memlm.QuantConfig(
        "int4", targets={"model.embed_tokens": "int8-g64", "re:.*v_proj": "int8"},
        ignore=[r"re:model\.layers\.1\.mlp"],
    )  # fmt: skip
    memlm.quantize_files(source, tmp_path / "packed", config)
    model = memlm.load(tmp_path / "packed")
    assert (
        str(model.lm_head.format) == "int8-g64" and model.lm_head.codes is model.embed_tokens.codes
    )
    assert [str(m.format) for m in model.layers[0].attention.qkv_proj.layers] == [
        "int4a-g32", "int4a-g32", "int8-g32"]  # fmt: skip
    assert type(model.layers[1].mlp.gate_up_proj) is torch.nn.Linear
    theirs = memlm.quantize_(LlamaForCausalLM.from_pretrained(source), config)
    torch.testing.assert_close(run(model), tiny.logits(theirs, IDS), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="pattern 're:qkv' matches no layer".replace("' ", "': ")):
        memlm.quantize_files(source, tmp_path / "x", memlm.QuantConfig(ignore=["re:qkv"]))
    assert not (tmp_path / "x").exists()


def test_gguf_keeps_its_codes(tmp_path):
    theirs = tiny.llama(tmp_path / "hf", intermediate_size=128)
    kinds = [tiny_gguf.Type[name] for name in ("Q4_1", "Q8_0", "Q4_0", "Q5_1")]
    tiny_gguf.write_llama(tmp_path / "model.gguf", theirs, kinds)
    with pytest.warns(UserWarning, match=r"\d tensors, .*, are stored in codes that no format"):
        memlm.quantize_files(tmp_path / "model.gguf", tmp_path / "kept", "int4-g64")
    model = memlm.load(tmp_path / "kept")
    assert torch.equal(
        run(model), run(memlm.quantize_(memlm.load(tmp_path / "model.gguf"), "int4-g64"))
    )
    formats = {str(m.format) for m in model.modules() if hasattr(m, "format")}
    assert formats == {"int4a-g32", "int8-g32", "int4-g32", "int4-g64"}  # Q5_1 fits none
    assert model.tokenizer.encode("th")

    memlm.quantize_files(tmp_path / "model.gguf", tmp_path / "anew", "int4-g64", requantize=True)
    model = memlm.load(tmp_path / "anew")
    assert {str(m.format) for m in model.modules() if hasattr(m, "format")} == {"int4-g64"}


def test_a_packed_folder_keeps_its_codes(source, tmp_path):
    memlm.quantize_files(source, tmp_path / "a")
    memlm.quantize_files(tmp_path / "a", tmp_path / "b", "int8")
    assert files_of(tmp_path / "a")[WEIGHTS] == files_of(tmp_path / "b")[WEIGHTS]


PEAK = """
import resource, sys, torch, memlm
from memlm import quantize_files
torch.set_num_threads(1)
memlm.quantize_weight(torch.ones(32, 32), "int4")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_files(sys.argv[1], sys.argv[2], memlm.QuantConfig("int4", "int8"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def grown(source, target):
    """By how many bytes the peak of a process grows that quantises."""
    command = [sys.executable, "-c", PEAK, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path):
    """Four times the layers take no more of it; what is mapped counts."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 16384}
    peaks = []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        tiny.llama(folder, tie_word_embeddings=True, num_hidden_layers=layers, **sizes)
        peaks.append(grown(folder, tmp_path / f"packed-{layers}"))
    largest, model = 16384 * 512 * 4, (tmp_path / "16" / WEIGHTS).stat().st_size
    assert model > 250e6
    assert max(peaks) < 2 * largest + 16e6 and peaks[1] < peaks[0] + 16e6


def test_tensors_at_odd_places(tmp_path, monkeypatch):
    """As other writers leave them: such tensors are copies in memory, which nothing may let go."""
    model = tiny.llama(tmp_path / "source", hidden_size=256)
    header, data, size = {}, b"", 1
    for name, tensor in model.state_dict().items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [size, size + len(raw)],
        }
        data, size = data + raw, size + len(raw)
    header["odd"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    expected = run(memlm.quantize_(memlm.load(tmp_path / "source"), "int8"))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "source" / WEIGHTS).write_bytes(
        len(text).to_bytes(8, "little") + text + b"x" + data
    )
    with pytest.raises(memlm.FormatError, match="'odd' is not known"):
        memlm.load(tmp_path / "source")
    monkeypatch.setattr(Decoder, "hf_ignored", re.compile("odd"))
    memlm.quantize_files(tmp_path / "source", tmp_path / "packed", "int8")
    assert torch.equal(run(memlm.load(tmp_path / "packed")), expected)


def test_large_weights_go_by_rows(tmp_path, monkeypatch):
    """Some rows at a time, with the same result."""
    w = torch.randn(1000, 300, generator=torch.manual_seed(0))
    w[999, 299] = 1e-3
    whole = memlm.quantize_weight(w, "int4")
    monkeypatch.setattr(quantize, "_CHUNK", 100_000)
    seen = []
    parts = memlm.quantize_weight(w, "int4", seen.append)
    assert len(seen) == 2 * 13 and sum(len(rows) for rows in seen) == 2000
    for part, tensor in whole.tensors().items():
        assert torch.equal(parts.tensors()[part], tensor)
    w[999, 299] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        memlm.quantize_weight(w, "int4", seen.append)


@pytest.mark.models
def test_smollm2_gguf(tmp_path):
    """All of the file's codes, in little memory."""
    assert grown(data.smollm2_gguf(), tmp_path / "packed") < 125e6
    model = memlm.load(tmp_path / "packed")
    formats = [str(m.format) for m in model.modules() if hasattr(m, "format")]
    assert sorted(set(formats)) == ["int4a-g32", "int8-g32"] and len(formats) == 122
    exact, stored = (
        memlm.load(data.smollm2_gguf(), dequantize=True),
        memlm.load(tmp_path / "packed", dequantize=True),
    )
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter, stored.get_parameter(name)), name


KILLED = """
import os, sys, memlm
from memlm import streaming
streaming._PART = 1  # every tensor a part
def progress(done, total, name):
    print(done, flush=True)
    if done == 7:
        os.kill(os.getpid(), 9)
memlm.quantize_files(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_killed_and_taken_up(source, tmp_path, monkeypatch):
    target = tmp_path / "packed"
    done = subprocess.run([sys.executable, "-c", KILLED, source, target], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (target / WEIGHTS).exists() and len(list((target / ".partial").iterdir())) == 8
    with pytest.raises(FileNotFoundError):
        memlm.load(target)
    (target / ".partial" / "00002.safetensors").write_bytes(b"torn")  # as a loss of power may
    made = []
    make = streaming._make
    monkeypatch.setattr(streaming, "_PART", 1)
    monkeypatch.setattr(streaming, "_make", lambda *a: made.append(a[1].name) or make(*a))
    seen = []
    memlm.quantize_files(source, target, progress=lambda done, total, name: seen.append(done))
    assert seen == list(range(1, len(seen) + 1)) and len(made) == len(seen) - 6
    memlm.quantize_files(source, tmp_path / "whole")
    assert files_of(target) == files_of(tmp_path / "whole")


def test_changed_sources_or_settings_start_afresh(source, tmp_path, monkeypatch):
    def stopped(*arguments):
        def progress(done, total, name):
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            memlm.quantize_files(source, tmp_path / "packed", *arguments, progress=progress)

    made = []
    make = streaming._make
    monkeypatch.setattr(streaming, "_PART", 1)
    monkeypatch.setattr(streaming, "_make", lambda *a: made.append(a[1].name) or make(*a))
    stopped()
    stopped("int8")
    assert len(made) == 12  # of each run the sixth was made while the fifth was written
    time.sleep(0.01)
    os.utime(source / WEIGHTS)
    memlm.quantize_files(source, tmp_path / "packed", "int8")
    assert len(made) == 12 + 20  # all tensors of the model


def test_failures_leave_nothing(source, tmp_path):
    tensors, metadata = safetensors.open_mapped(source / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    bad = tensors[name].clone()
    bad[3, 5] = float("nan")
    safetensors.write(tmp_path / "bad", {**tensors, name: bad}, metadata)
    os.replace(tmp_path / "bad", source / WEIGHTS)
    with pytest.raises(ValueError, match=f"{name}: .*NaN or Inf"):
        memlm.quantize_files(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(FileExistsError, match="something else"):
        memlm.quantize_files(tmp_path / "source", tmp_path)
    with pytest.raises(ValueError, match="dst: .* lies inside src"):
        memlm.quantize_files(source, source / "packed")
