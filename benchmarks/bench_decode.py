"""Whole models, prefill and decoding, beside llama.cpp's and others' llama-bench: docs/decoding.md.

    python -m benchmarks.bench_decode --work DIR [--models smollm2,1.1b] [--kv f32,int8]
        [--rival NAME=PATH/llama-bench ...] [--record]

Everything takes turns, several rounds of it; the medians.  A rival runs the model that memlm exports
to GGUF: the same codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import memlm
from benchmarks import harness, synthetic
from memlm import data, limits
from memlm.export import export
from memlm.models.batch import Batch
from memlm.models.decoder import Decoder

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "decoding.md", ROOT / "benchmarks" / "results" / "decode.json"
PREFILL, PROMPT, TOKENS, BATCH = 512, 32, 64, 16


@dataclass(frozen=True)
class Measurement:
    """Tokens per second, medians: of a prompt of PREFILL, of decoding TOKENS after a prompt of PROMPT,
    and of BATCH sequences after prompts of unequal length, together; ``weight_mb``: what a step reads
    of the weights; ``limit_gbps``: bytes from memory, measured in the same run."""

    model: str
    implementation: str
    kv: str
    prefill: float
    decode: float
    batch: float | None
    weight_mb: float
    limit_gbps: float
    threads: int
    isa: str
    device: str
    memlm: str
    torch: str
    commit: str

    @property
    def of_limit(self) -> float:
        """Decoding's share of what reading the weights alone allows."""
        return self.decode * self.weight_mb / 1e3 / self.limit_gbps


def weight_bytes(model: Decoder) -> int:
    """What a step reads: all weights, but of an embedding that is not the head, too, a row."""
    parts = [model.layers, model.norm, model.lm_head]
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def ids_of(model: Decoder, count: int) -> list[int]:
    """Any tokens do: the work does not depend on them."""
    generator = torch.manual_seed(count)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()


def prefill(model: Decoder, kv: str) -> float:
    """Tokens per second."""
    cache, ids = model.new_cache(kv), torch.tensor([ids_of(model, PREFILL)])
    harness._settle()
    with torch.inference_mode():
        start = time.perf_counter()
        model(ids, cache, last_only=True)
        return PREFILL / (time.perf_counter() - start)


def decode(model: Decoder, kv: str, lengths: list[int]) -> float:
    """Tokens per second of all sequences together, by the median step."""
    batch = Batch(model, model.new_cache(kv))
    for length in lengths:
        batch.add(ids_of(model, length), TOKENS + 8)
    while len(batch.step()) < len(lengths):
        pass
    seconds = []
    for _ in range(TOKENS):
        start = time.perf_counter()
        batch.step()
        seconds.append(time.perf_counter() - start)
    return len(lengths) / statistics.median(seconds)


def llama_bench(program: str, file: Path, threads: int) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding, as llama-bench says."""
    command = [
        program,
        "-m",
        file,
        "-t",
        threads,
        "-p",
        PREFILL,
        "-n",
        TOKENS,
        "-r",
        1,
        "-o",
        "json",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program}: {done.stderr[-2000:]}")
    tests = json.loads(done.stdout)
    prefill, decode = (next(t["avg_ts"] for t in tests if t[key]) for key in ("n_prompt", "n_gen"))
    return prefill, decode


def folder_of(name: str, work: Path) -> Path:
    """The packed model: linear layers int4, embeddings and head int8."""
    packed = work / f"{name}-int4"
    if not packed.exists():
        source = work / name
        if name != "smollm2":
            synthetic.write(source, name)
        elif not source.exists():
            export(data.smollm2_gguf(), source, "f32")
        memlm.quantize_files(source, packed, memlm.QuantConfig("int4", "int8", "int8"))
    return packed


def measure(
    name: str, work: Path, kvs: list[str], rivals: dict[str, str], rounds: int
) -> list[Measurement]:
    folder, threads = folder_of(name, work), torch.get_num_threads()
    model, gguf = memlm.load(folder), work / f"{name}-int4.gguf"
    if rivals and not gguf.exists():
        export(folder, gguf, "gguf")
    gbps = limits.measure(threads).dram_gbps
    # Prompts of 17 to 47 tokens, say.
    lengths = [PROMPT + 2 * (i - BATCH // 2) + 1 for i in range(BATCH)]
    found: dict[tuple[str, str], list[tuple]] = {}
    for _ in range(rounds):
        for kv in kvs:
            figures = prefill(model, kv), decode(model, kv, [PROMPT]), decode(model, kv, lengths)
            found.setdefault(("memlm", kv), []).append(figures)
        for rival, program in rivals.items():
            found.setdefault((rival, "f16"), []).append(
                (*llama_bench(program, gguf, threads), None)
            )
        for (implementation, kv), rows in found.items():
            print(name, implementation, kv, rows[-1], file=sys.stderr)
    run, results = harness.run(), []
    for (implementation, kv), rows in found.items():
        medians = [None if None in column else statistics.median(column) for column in zip(*rows)]
        size = weight_bytes(model) / 1e6  # a rival's are the same codes
        results.append(Measurement(name, implementation, kv, *medians, size, gbps, threads, **run))
    return results


def page(results: list[Measurement]) -> str:
    first = results[0]
    lines = [
        "# Decoding whole models",
        "",
        f"Written by `python -m benchmarks.bench_decode`: {first.device} ({first.isa}), {first.threads} "
        f"threads, torch {first.torch}, memlm {first.memlm}; medians of runs by turns.  Linear layers "
        "int4, embedding and head int8; *smollm2* is SmolLM2-135M-Instruct, *1.1b* has random weights "
        "and the shape of TinyLlama-1.1B.",
        "",
        f"Tokens per second: *prefill* of {PREFILL}, *decode* after a prompt of {PROMPT}, *batch* of "
        f"{BATCH} sequences of unequal length, all together; *of the limit*: decoding against reading the "
        "weights from memory at the speed measured in the same run.",
        "",
        "| model | | cache | prefill | decode | of the limit | batch | batch / decode |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        batch = ["", ""] if r.batch is None else [f"{r.batch:,.0f}", f"{r.batch / r.decode:.1f}"]
        cells = [r.model, r.implementation, r.kv, f"{r.prefill:,.0f}", f"{r.decode:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{100 * r.of_limit:.0f} %", *batch]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where models are made and kept")
    parser.add_argument("--models", default="smollm2,1.1b")
    parser.add_argument("--kv", default="f32,bf16,int8,int4")
    parser.add_argument(
        "--rival", action="append", default=[], metavar="NAME=PATH", help="a llama-bench"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--record", action="store_true", help="write docs/decoding.md and the results"
    )
    options = parser.parse_args()
    rivals = dict(rival.split("=", 1) for rival in options.rival)
    options.work.mkdir(parents=True, exist_ok=True)
    results = [
        measurement
        for name in options.models.split(",")
        for measurement in measure(
            name, options.work, options.kv.split(","), rivals, options.rounds
        )
    ]
    print(page(results))
    if options.record:
        PAGE.write_text(page(results))
        RESULTS.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
