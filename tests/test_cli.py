"""The command line on a small model: what each command does, prints and refuses."""

import json

import pytest
import torch
from typer.testing import CliRunner

import memlm
from memlm import cli

from . import tiny

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely. " * 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.llama(folder, tie_word_embeddings=True)
    tiny.tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "int4"
    run("quantize", source, folder)
    return folder


def run(*arguments):
    """The command's standard output."""
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def run_json(*arguments):
    return json.loads(run(*arguments, "--json", "-"))


def test_quantize(source, tmp_path):
    result = run_json("quantize", source, tmp_path / "q", "--linear", "int4-g64", "--mode", "accurate")
    weights = tmp_path / "q" / "model.safetensors"
    assert result["disk_bytes"] == weights.stat().st_size
    assert result["formats"] == ["int4-g64", "int8-g32"]
    model = memlm.load(tmp_path / "q")
    assert model.layers[0].mlp.down_proj.format.name == "int4-g64"
    assert model.layers[0].mlp.down_proj.mode == "accurate"
    assert model.lm_head.codes is model.embed_tokens.codes
    text = run("quantize", source, tmp_path / "plain", "--embedding", "float")
    assert "MB" in text and "% of f32" in text.replace("\n", " ")
    assert memlm.load(tmp_path / "plain").lm_head.weight.is_floating_point()


def test_quantize_layers_that_differ(source, tmp_path):
    run("quantize", source, tmp_path / "q", "--target", "re:.*o_proj=int8", "--target",
        "re:.*down_proj=float", "--ignore", "re:.*layers[.]0[.]mlp", "--mode", "accurate")  # fmt: skip
    layer = memlm.load(tmp_path / "q").layers[1]
    assert str(layer.attention.o_proj.format) == "int8-g32"
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    assert str(layer.mlp.gate_up_proj.format) == "int4a-g32"
    assert type(memlm.load(tmp_path / "q").layers[0].mlp.gate_up_proj) is torch.nn.Linear
    with pytest.raises(ValueError, match="--target 'int8': expected PATTERN=FORMAT"):
        run("quantize", source, tmp_path / "x", "--target", "int8")


def test_export(packed, source, tmp_path):
    result = run_json("export", packed, tmp_path / "out", "--to", "f32")
    assert result["files"]["model.safetensors"] > (packed / "model.safetensors").stat().st_size
    assert "MB" in run("export", packed, tmp_path / "half", "--to", "bf16")
    assert memlm.load(tmp_path / "half").norm.weight.dtype == torch.bfloat16


def test_verify(packed, source, tmp_path):
    assert "as written" in run("verify", packed)
    assert "has no checksum" in run("verify", source)
    data = bytearray((packed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(memlm.FormatError, match="damaged"):
        run("verify", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no safetensors files"):
        run("verify", source.parent / "nowhere")


def test_info(source, packed):
    text = run("info", packed)
    assert "layers.0.attention.qkv_proj" in text and "int4a-g32" in text and memlm.isa() in text
    result = run_json("info", packed)
    assert result["bytes"] == memlm.explain(memlm.load(packed)).bytes
    floats = {row["format"] for row in run_json("info", source)["rows"]}
    assert floats == {"float32"}


def test_generate(packed):
    arguments = ("generate", packed, "Call me", "--max-tokens", "5")
    first = run_json(*arguments)
    assert 1 <= first["tokens"] <= 5 and first["seconds"] > 0
    assert first["text"] == run_json(*arguments)["text"]
    assert first["text"] in run(*arguments)
    assert first["text"] == run_json(*arguments, "--pages", "huge")["text"]
    assert first["text"] == run_json(*arguments, "--kv", "f32")["text"]
    sampled = ("--temperature", "90", "--top-k", "50", "--top-p", "0.9", "--seed")
    texts = {run_json(*arguments, *sampled, seed)["text"] for seed in range(5)}
    assert len(texts) > 1
    assert run_json(*arguments, *sampled, 3)["text"] == run_json(*arguments, *sampled, 3)["text"]


def test_eval(source, packed, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    arguments = ("eval", packed, "--text", file, "--window", "32", "--tokens", "128")
    alone = run_json(*arguments)
    assert alone["tokens"] == 4 * 31 and alone["perplexity"] > 1 and alone["kl"] is None
    against = run_json(*arguments, "--base", source)
    assert against["perplexity"] == alone["perplexity"] and against["kl"] > 0
    assert 0 <= against["agreement"] <= 1
    assert "perplexity" in run(*arguments)
    rounded = run_json(*arguments, "--kv", "int4")["perplexity"]
    assert rounded != alone["perplexity"] and rounded == pytest.approx(alone["perplexity"], rel=0.5)


def test_bench(packed):
    result = run_json("bench", packed, "--threads", "1")
    assert result["threads"] == 1 and result["isa"] == memlm.isa()
    for key in ("load_s", "prefill_tps", "decode_tps"):
        assert result[key] > 0
    assert "decode_tps" in run("bench", packed)
    assert run_json("bench", packed, "--kv", "int8")["memory"]["kv_cache"] < 0.6 * result["memory"]["kv_cache"]


def test_json_goes_to_a_file(packed, tmp_path):
    file = tmp_path / "info.json"
    assert "total" in run("info", packed, "--json", file)
    assert json.loads(file.read_text())["rows"]
    assert [f.name for f in tmp_path.iterdir()] == ["info.json"]


REFUSED = {
    "missing": (("info", "nowhere"), "nowhere: no such file or folder"),
    "format": (("quantize", "SOURCE", "OUT", "--linear", "int3"), "format: got 'int3'"),
    "mode": (("quantize", "SOURCE", "OUT", "--mode", "best"), "mode: got 'best'"),
    "over the source": (("quantize", "SOURCE", "SOURCE"), "holds something else"),
    "top_p": (("generate", "PACKED", "a", "--top-p", "0"), "top_p: got 0"),
    "no template": (("generate", "PACKED", "a", "--chat"), "has no chat template"),
    "text": (("eval", "PACKED", "--text", "nowhere.txt"), "nowhere.txt"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_mistakes_are_one_line(source, packed, tmp_path, monkeypatch, capsys, arguments, message):
    names = {"SOURCE": source, "PACKED": packed, "OUT": tmp_path / "out"}
    monkeypatch.setattr("sys.argv", ["memlm", *(str(names.get(a, a)) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert message in shown.replace("\n", " ") and "Traceback" not in shown
    assert not (tmp_path / "out").exists()
