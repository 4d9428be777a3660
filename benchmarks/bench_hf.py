"""transformers' ``generate`` on SmolLM2, as it is and with memlm's layers: docs/transformers.md.

    python -m benchmarks.bench_hf --work DIR [--record]

All models by turns in one process; the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import memlm
from benchmarks import bench_decode, harness
from memlm import limits

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
PROMPT, TOKENS, ROUNDS = 16, 64, 5


def models(work: Path) -> dict[str, torch.nn.Module]:
    packed = bench_decode.folder_of("smollm2", work)
    load = AutoModelForCausalLM.from_pretrained
    return {
        "transformers, f32": load(work / "smollm2", dtype=torch.float32),
        "transformers, bf16": load(work / "smollm2", dtype=torch.bfloat16),
        "memlm.Linear, int4": load(packed),
        "the same, fused layers": memlm.hf.fuse_layers(load(packed)),
        "fused layers, int8 cache": memlm.hf.fuse_layers(load(packed), kv="int8"),
    }


def tokens_per_second(model, count: int) -> float:
    ids = torch.randint(1000, (1, PROMPT), generator=torch.manual_seed(0))
    settings = {"do_sample": False, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=count, min_new_tokens=count, **settings)
    return count / (time.perf_counter() - start)


def page(found: dict[str, float]) -> str:
    first = next(iter(found.values()))
    lines = [
        "# Decoding in transformers",
        "",
        f"Written by `python -m benchmarks.bench_hf`: SmolLM2-135M-Instruct, `model.generate`, greedy, "
        f"{TOKENS} tokens after a prompt of {PROMPT}; {limits.cpu_name()} ({memlm.isa()}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, memlm {memlm.__version__} "
        f"({harness.commit()}); medians of {ROUNDS} runs by turns.",
        "",
        "| model | tokens/s | |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {speed:.1f} | {speed / first:.1f}x |" for name, speed in found.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where models are made and kept")
    parser.add_argument("--record", action="store_true", help="write docs/transformers.md")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    loaded = models(options.work)
    for model in loaded.values():
        tokens_per_second(model, 4)
    runs = [{name: tokens_per_second(model, TOKENS) for name, model in loaded.items()} for _ in range(ROUNDS)]
    found = {name: statistics.median(run[name] for run in runs) for name in loaded}
    print(page(found))
    if options.record:
        PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
