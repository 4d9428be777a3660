"""memlm.plan's predictions beside measured peaks: docs/memory.md.

    python -m benchmarks.bench_plan [--folder WORK]

Every measurement is a process of its own: it warms up (memlm.workload.warm_up), notes what it
takes, maps a model, reads all of its weights once, runs the work, and asks the kernel for the peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import memlm
from benchmarks import harness
from memlm import cpu, data, limits, memory, picture, plan, workload
from memlm.kv_cache import PagedKVCache
from memlm.models.decoder import Decoder
from memlm.models.load import build
from memlm.plan import Settings

ROOT = Path(__file__).parent.parent
SYNTHETIC = {  # wide, few layers; "wide" has more outputs than one chunk of the gradient's rows
    "llama-768": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    "qwen2-1280": {
        "model_type": "qwen2", "vocab_size": 1000, "hidden_size": 1280, "intermediate_size": 3456,
        "num_hidden_layers": 3, "num_attention_heads": 20, "num_key_value_heads": 5,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "bert-512": {
        "model_type": "bert", "vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
}  # fmt: skip
REAL = {"SmolLM2": data.smollm2_gguf, "MiniLM": data.minilm}


@dataclass(frozen=True)
class Case:
    model: str
    settings: Settings


def infer(model: str, batch: int, context: int, format: str, **others) -> Case:
    return Case(model, Settings(context, batch, format, **others))


def train(model: str, batch: int, context: int, format: str, how: str = "full", **others) -> Case:
    return Case(model, Settings(context, batch, format, train=how, **others))


CASES = [
    infer("SmolLM2", 1, 512, "float32"),
    infer("SmolLM2", 4, 512, "bfloat16"),
    infer("SmolLM2", 2, 1024, "int8"),
    infer("SmolLM2", 1, 512, "int4"),
    infer("SmolLM2", 1, 4096, "int4"),
    infer("SmolLM2", 4, 1024, "int4", dtype="bfloat16"),
    infer("SmolLM2", 8, 530, "int4", prompt=500),
    infer("MiniLM", 8, 256, "float32"),
    infer("MiniLM", 64, 128, "int8"),
    infer("llama-768", 4, 512, "float32"),
    infer("llama-768", 2, 2048, "bfloat16"),
    infer("qwen2-1280", 4, 512, "int4a-g128"),
    infer("bert-512", 16, 256, "float32"),
    train("MiniLM", 32, 128, "float32"),
    train("MiniLM", 64, 128, "int8", "lora", checkpoint=True),
    train("llama-768", 4, 256, "float32"),
    train("llama-768", 4, 256, "float32", checkpoint=True),
    train("llama-768", 4, 256, "float32", optimizer="sgd"),
    train("llama-768", 4, 256, "bfloat16", optimizer="adafactor"),
    train("qwen2-1280", 4, 256, "int4", "lora"),
    train("qwen2-1280", 4, 256, "int8", "lora", checkpoint=True),
    train("bert-512", 16, 128, "bfloat16"),
    train("SmolLM2", 2, 256, "int4", "lora"),
    train("SmolLM2", 4, 256, "bfloat16", checkpoint=True),
    train("SmolLM2", 2, 256, "float32"),
]


def make(case: Case, work: Path) -> Path:
    """The case's model as a packed folder (or one of floats), made once."""
    s = case.settings
    parts = (case.model, s.format, *((s.embedding, s.dtype) if s.packed else ()))
    folder = work / "-".join(parts)
    if folder.exists():
        return folder
    floats = torch.float32 if s.packed else s.floats
    if case.model in REAL:
        model = memlm.load(REAL[case.model](), floats)
    else:
        model = random(SYNTHETIC[case.model]).to(floats)
    if s.packed:
        memlm.quantize_(model, workload.quantization(s), strict=True)
        model.to(s.floats)
    memlm.save(model, folder)
    return folder


def random(config: dict) -> nn.Module:
    model = build(config).to_empty(device="cpu")
    if isinstance(model, Decoder) and model.config.tied:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty unties them
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.hf_config = config
    return model


def measure(folder: Path, settings: Settings, default_malloc: bool = False) -> dict[str, int]:
    """Bytes by part, measured in a fresh process with one thread: ``base``, ``peak``, and of what
    is there after the work ``weights``, ``kv_cache``, ``gradients``, ``optimizer``."""
    arguments = [json.dumps(asdict(settings)), str(int(default_malloc))]
    command = [sys.executable, "-m", "benchmarks.bench_plan", "--worker", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def worker(folder: str, settings: str, default_malloc: str) -> None:
    """Prints what :func:`measure` returns."""
    s = Settings(**json.loads(settings))
    if not int(default_malloc) and not memory.return_freed():
        raise OSError("this C library's malloc cannot give freed blocks back")
    config = json.loads((Path(folder) / "config.json").read_text())
    workload.warm_up("encoder" if config["model_type"] == "bert" else "decoder", s)
    gc.collect()
    anonymous, base = memory.baseline(), memory.resident_bytes()
    model = memlm.load(folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().view(-1)[:: 1024 // tensor.element_size()].max()  # reads every page
    memory.reset_peak()
    kept = workload.run(workload.prepare_(model, s), s)
    account = memory.account(anonymous, model, kept if isinstance(kept, PagedKVCache) else None)
    found = {
        "base": base,
        "peak": memory.peak_bytes(),
        "weights": account.mapped_weights + account.private_weights,
        "kv_cache": account.kv_cache,
        "gradients": 0,
        "optimizer": 0,
    }
    if isinstance(kept, torch.optim.Optimizer):
        states = [t for state in kept.state.values() for t in state.values()]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found["optimizer"] = memory.resident_of(t for t in states if isinstance(t, torch.Tensor))
        found["gradients"] = memory.resident_of(gradients)
    print(json.dumps(found))


def compare(case: Case, work: Path) -> tuple[plan.Prediction, dict[str, int]]:
    """The prediction without base, and what was measured."""
    folder = make(case, work)
    config = json.loads((folder / "config.json").read_text())
    return plan.predict(config, case.settings), measure(folder, case.settings)


def largest(prediction: plan.Prediction, part: str) -> int:
    """The most that a part is at any moment: what is there of it when the work is done."""
    return max(moment.get(part, 0) for moment in prediction.moments.values())


def describe(case: Case) -> str:
    s = case.settings
    words = [f"{s.batch} x {s.context:,}"]
    words += [f"prompt {s.prompt}"] * (s.prompt is not None)
    words += [s.format] + [f"{s.dtype} activations"] * (s.packed and s.dtype != "float32")
    if s.train:
        words += [s.train, s.optimizer] + ["checkpointed"] * s.checkpoint
    return ", ".join(words)


def row(case: Case, predicted: plan.Prediction, found: dict, default: dict) -> str:
    def pair(part: str) -> str:
        ours, theirs = largest(predicted, part), found[part]
        return f"{ours / 1e6:,.1f} / {theirs / 1e6:,.1f}" if ours or theirs else ""

    grown = found["peak"] - found["base"]
    kept = default["peak"] - default["base"]
    parts = map(pair, ("weights", "kv_cache", "gradients", "optimizer"))
    cells = [case.model, describe(case), *parts]
    cells += [predicted.peak, f"{predicted.total / 1e6:,.0f}", f"{grown / 1e6:,.0f}"]
    cells += [f"{predicted.total / grown - 1:+.1%}", f"{found['base'] / 1e6:,.0f}"]
    return "| " + " | ".join([*cells, f"{kept / 1e6:,.0f}"]) + " |"


HEAD = (
    "| model | setting | weights | KV cache | gradients | optimizer | peak at | predicted | "
    "measured | error | base | glibc's default |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |\n"
)
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"


def write(rows: list[str]) -> None:
    """Puts the rows into docs/memory.md."""
    where = f"{limits.cpu_name()} ({cpu.isa()}), torch {torch.__version__}, one thread; MB (10^6)."
    text = f"{where}\n\n{HEAD}" + "\n".join(rows) + "\n"
    harness.put_between(ROOT / "docs" / "memory.md", BEGIN, END, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps the models made for it here")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(*given.worker)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in CASES:
            work = given.folder or Path(temporary)
            predicted, found = compare(case, work)
            default = measure(make(case, work), case.settings, default_malloc=True)
            rows.append(row(case, predicted, found, default))
            write(rows)
            print(rows[-1], flush=True)
    config = plan.read_config(data.smollm2_gguf())
    asked = Settings(1024, 4, train="full")
    base = plan.base(config, asked)
    advice = plan.recommend(config, asked, 4 * 10**9, base=base)
    title = "SmolLM2-135M, full training with AdamW, context 1,024, batch 4"
    picture.draw(advice, title, ROOT / "docs" / "memory.png")


if __name__ == "__main__":
    main()
