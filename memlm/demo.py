"""``memlm demo``: quantise real models, measure what it costs and gains, write a report.

Each variant of the decoder is written to disk and measured in a process of its own
(``memlm bench``), so that its memory is its own; quality is measured in this process, on the same
files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from rich import box
from rich.table import Table

import memlm
from memlm import data, limits, report
from memlm.cli import Bar, megabytes, out, stream, write_json
from memlm.convert import QuantConfig
from memlm.models.evaluate import WINDOW, evaluate_all

# Name in the report -> dtype of a float variant, or how to quantise.
VARIANTS: dict[str, torch.dtype | QuantConfig] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": QuantConfig("int8", embedding="int8"),
    "int4": QuantConfig("int4", embedding="int8"),
    # Not on the grid of 32 weights that the decoder's publisher rounded them to.
    "int4a-g64": QuantConfig("int4a-g64", embedding="int8"),
}
EVALUATION_TOKENS = 8192  # 16 windows
SENTENCES = 256
QUESTION = "What is gravity?"
ANSWER_TOKENS = 120


def make_variant(source: Path, variant: torch.dtype | QuantConfig, folder: Path, bar) -> int:
    """Writes one variant of the model at ``source``; returns the bytes of its weights file."""
    quantised = isinstance(variant, QuantConfig)
    model = memlm.load(source, torch.float32 if quantised else variant, dequantize=True)
    if quantised:
        memlm.quantize_(model, variant, strict=True, progress=bar)
    return memlm.save(model, folder)["model.safetensors"]


def measure_in_process(folder: Path, threads: int) -> dict:
    """``memlm bench`` of a folder, in a fresh process."""
    command = [sys.executable, "-c", "from memlm.cli import main; main()", "bench", str(folder)]
    done = subprocess.run(
        [*command, "--threads", str(threads), "--json", "-"], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"memlm bench {folder.name} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def decoder_rows(work: Path, threads: int) -> list[dict]:
    """SmolLM2 in every variant: size, memory, speed and quality."""
    source, rows = data.smollm2_gguf(), []
    folders = {name: work / name for name in VARIANTS}
    for name, folder in folders.items():
        with Bar(f"SmolLM2 {name}: quantising") as bar:
            disk = make_variant(source, VARIANTS[name], folder, bar)
        out.print(f"SmolLM2 {name}: {megabytes(disk)}; measuring speed and memory", highlight=False)
        speed = measure_in_process(folder, threads)
        rows.append({"format": name, "disk_bytes": disk, **speed})
    models = {name: memlm.load(folder) for name, folder in folders.items()}
    ids = models["f32"].tokenizer.encode(data.moby_dick())[:EVALUATION_TOKENS]
    out.print(f"SmolLM2: perplexity and KL on {len(ids):,} tokens of Moby-Dick")
    with Bar("evaluating") as bar:
        scores = evaluate_all(models, ids, models["f32"], WINDOW, bar)
    return [{**row, **asdict(scores[row["format"]])} for row in rows]


def encoder_rows(work: Path) -> list[dict]:
    """MiniLM in every variant: size, and how far its sentence embeddings move."""
    source, rows, exact = data.minilm(), [], None
    sentences = [s.strip() for s in data.moby_dick()[:400_000].split(". ") if 40 < len(s) < 300]
    for name, variant in VARIANTS.items():
        folder = work / f"minilm-{name}"
        with Bar(f"MiniLM {name}: quantising") as bar:
            disk = make_variant(source, variant, folder, bar)
        vectors = memlm.load(folder).embed(sentences[:SENTENCES])
        exact = vectors if exact is None else exact
        cosine = (vectors * exact).sum(-1)
        rows.append(
            {
                "format": name,
                "disk_bytes": disk,
                "sentences": len(vectors),
                "cosine_mean": cosine.mean().item(),
                "cosine_min": cosine.min().item(),
                "same_nearest": (_nearest(vectors) == _nearest(exact)).float().mean().item(),
            }
        )
    return rows


def _nearest(vectors: torch.Tensor) -> torch.Tensor:
    """For each sentence the index of the most similar other one."""
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(-1)


def run(folder: Path, json_file: Path | None = None) -> dict:
    """Runs the demo, prints its tables, writes report.md, its plots and demo.json to ``folder``;
    returns what ``json_file`` receives."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    source, encoder = data.smollm2_gguf(), data.minilm()
    data.moby_dick()
    out.print("measuring this machine's limits")
    result = {
        "model": source.stem,
        "encoder": encoder.name,
        "device": {"cpu": limits.cpu_name(), "threads": threads, "isa": memlm.isa()},
        "versions": {"memlm": memlm.__version__, "torch": torch.__version__},
        "limits": limits.measure(threads).to_dict(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        result["rows"] = decoder_rows(work, threads)
        result["encoder_rows"] = encoder_rows(work)
        for title, columns, rows in (
            ("SmolLM2-135M", report.DECODER_COLUMNS, result["rows"]),
            ("MiniLM-L6", report.ENCODER_COLUMNS, result["encoder_rows"]),
        ):
            table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
            for heading, unit, _ in columns:
                justify = "left" if heading == "format" else "right"
                table.add_column(f"{heading}\n{unit}", justify=justify, no_wrap=True)
            for row in rows:
                table.add_row(*(show(row) for *_, show in columns))
            out.print(table)
        out.print(f"int4 answers {QUESTION!r}:\n", highlight=False)
        model = memlm.load(work / "int4")
        text, tokens, seconds = stream(
            model, QUESTION, True, ANSWER_TOKENS, 0.0, 0, 1.0, None, show=not out.stderr
        )
    result["chat"] = {"question": QUESTION, "answer": text, "tokens": tokens, "seconds": seconds}
    write_json(result, folder / "demo.json")
    written = report.write(result, folder)
    out.print(f"\n{tokens / seconds:.0f} tokens/s; report: {written}", highlight=False)
    write_json(result, json_file)
    return result
