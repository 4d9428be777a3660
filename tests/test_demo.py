"""The demo on small models, and its report."""

import json

import pytest

from memlm import data, demo, limits, report
from memlm.convert import QuantConfig

from . import tiny

TEXT = "Call me Ishmael, as they did. It was cold that winter, and the sea was grey as slate. " * 30


@pytest.fixture
def small(tmp_path, monkeypatch):
    decoder, encoder = tmp_path / "decoder", tmp_path / "encoder"
    tiny.llama(decoder, tie_word_embeddings=True)
    tiny.bert(encoder)
    for folder in (decoder, encoder):
        tiny.tokenizer(folder)
    settings = {"eos_token": None, "chat_template": "{{ messages[0].content }}"}
    (decoder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(data, "smollm2_gguf", lambda: decoder)
    monkeypatch.setattr(data, "minilm", lambda: encoder)
    monkeypatch.setattr(data, "moby_dick", lambda: TEXT)
    monkeypatch.setattr(limits, "measure", lambda threads: limits.Limits(threads, 20, 19, 50, 200))
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 1024)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 8)


def test_demo(small, tmp_path, capsys):
    result = demo.run(tmp_path / "report", tmp_path / "demo.json")
    assert json.loads((tmp_path / "demo.json").read_text()) == result
    assert result["model"] == "decoder" and result["limits"]["dram_gbps"] == 20
    rows = {row["format"]: row for row in result["rows"]}
    assert list(rows)[:4] == ["f32", "bf16", "int8", "int4"]
    wanted = {"format", "disk_bytes", "resident_bytes", "load_s", "prefill_tps", "decode_tps",
              "perplexity", "kl"}  # fmt: skip
    assert all(wanted <= row.keys() for row in rows.values())
    assert rows["f32"]["kl"] == 0 and rows["int4"]["kl"] > rows["int8"]["kl"] > 0
    assert rows["f32"]["disk_bytes"] > rows["bf16"]["disk_bytes"] > rows["int4"]["disk_bytes"]
    encoders = {row["format"]: row for row in result["encoder_rows"]}
    assert encoders["f32"]["cosine_min"] > 0.9999 > encoders["int4"]["cosine_mean"] > 0.9
    assert result["chat"]["answer"] in capsys.readouterr().out
    text = (tmp_path / "report" / "report.md").read_text()
    for row in result["rows"]:
        assert f"| {row['format']} |" in text and f"{row['perplexity']:.2f}" in text
    assert (tmp_path / "report" / "demo.png").exists() and "](demo.png)" in text


def test_variants_are_the_defaults_of_each_size():
    assert demo.VARIANTS["int4"].linear == QuantConfig().linear
    assert demo.VARIANTS["int8"].linear.name == "int8-g32"


def test_markdown_table():
    columns = (("format", "", lambda r: r["f"]), ("size", "MB", lambda r: f"{r['s']:.1f}"))
    assert report.markdown_table(columns, [{"f": "int4", "s": 1.25}]) == (
        "| format | size, MB |\n| --- | ---: |\n| int4 | 1.2 |"
    )
