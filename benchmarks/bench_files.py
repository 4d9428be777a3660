"""Quantising, loading and sharing of whole models: time, and memory by the kernel's account.

    python -m benchmarks.bench_files --work DIR [--models smollm2,1.1b,3b] [--parts quantise,load]

Every measurement is a process of its own.  Adds to benchmarks/results/files.json and writes
docs/files.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import memlm
from benchmarks import synthetic
from memlm import data, limits
from memlm.export import export
from memlm.io.pages import HOW, drop_from_cache

REPEATS = 3
RESULTS = Path(__file__).parent / "results" / "files.json"
PAGE = Path(__file__).parents[1] / "docs" / "files.md"

QUANTIZE = """
import json, resource, sys, time
start = time.perf_counter()
import memlm
memlm.quantize_files
imported = time.perf_counter()
memlm.quantize_files(sys.argv[1], sys.argv[2], memlm.QuantConfig("int4", "int8", "int4"))
print(json.dumps({"import_s": imported - start, "s": time.perf_counter() - imported,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""
FIRST_TOKEN = """
import json, sys, time
import torch
start = time.perf_counter()
import memlm
from memlm.memory import file_mapping
from memlm.models.generate import generate
model = memlm.load(sys.argv[1], pages=sys.argv[2])
tokens = generate(model, [1, 2, 3, 4, 5], 65)
next(tokens)
first = time.perf_counter() - start
stamps = [time.perf_counter(), *(time.perf_counter() for _ in tokens)]
steps = sorted(b - a for a, b in zip(stamps, stamps[1:]))
m = file_mapping(sys.argv[1] + "/model.safetensors")
anonymous = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
print(json.dumps({"first_s": first, "decode_tps": 1 / steps[len(steps) // 2], "mapped": m.resident,
    "private": m.private, "anonymous": anonymous}))
"""


def run(script: str, *arguments, group: str | None = None) -> dict:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    if group is not None:  # the shell enters the group, then becomes the command
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "-", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def files(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else list(folder.glob("*.safetensors"))


def pieces(source: Path):
    """The bytes of ``source``'s files, one piece after the other in the same memory."""
    buffer = memoryview(bytearray(1 << 20))
    for file in files(source):
        with open(file, "rb", buffering=0) as f:
            while got := f.readinto(buffer):
                yield buffer[:got]


def copy_seconds(source: Path, target: Path, count: int) -> float:
    """Reading all of ``source``'s bytes and writing ``count`` of them, to the disk."""
    start = time.perf_counter()
    with open(target, "wb", buffering=0) as out:
        for piece in pieces(source):
            out.write(piece[:count])
            count = max(0, count - len(piece))
        os.fsync(out.fileno())
    target.unlink()
    return time.perf_counter() - start


def prepare(source: Path, kind: str) -> None:
    """Has the page cache hold all of ``source`` (warm) or nothing of it (cold)."""
    for file in files(source):
        drop_from_cache(file)
    if kind == "warm":
        for _ in pieces(source):
            pass


def quantising(source: Path, target: Path) -> dict:
    """Medians, with the source in the page cache and not, each beside a plain copy."""
    rows = {"warm": [], "cold": []}
    for kind in [k for _ in range(REPEATS) for k in rows]:
        prepare(source, kind)
        shutil.rmtree(target, ignore_errors=True)
        result = run(QUANTIZE, source, target)
        prepare(source, kind)
        size = (target / "model.safetensors").stat().st_size
        result["copy_s"] = copy_seconds(source, target.with_suffix(".copy"), size)
        rows[kind].append(result)
    return {
        kind: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for kind, found in rows.items()
    }


class MemoryGroup:
    """A control group that holds at most ``limit`` bytes of memory, page cache included (version 1
    or 2); needs root."""

    def __init__(self, limit: int):
        for root, name in (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
        ):
            self.path = Path(root) / "memlm-bench"
            if Path(root, "cgroup.procs").exists():
                self.path.mkdir(exist_ok=True)
                if (self.path / name).exists():
                    (self.path / name).write_text(str(limit))
                    return
                self.path.rmdir()
        raise OSError("no control group for memory can be made here")

    def __enter__(self) -> str:
        return str(self.path)

    def __exit__(self, *_):
        time.sleep(0.2)  # until the kernel has seen its last process end
        self.path.rmdir()


def loading(folder: Path) -> dict:
    found = {how: [] for how in HOW}
    for how in [how for _ in range(REPEATS) for how in HOW]:
        found[how].append(run(FIRST_TOKEN, folder, how))
    rows = {
        how: {key: statistics.median(row[key] for row in runs) for key in runs[0]}
        for how, runs in found.items()
    }
    drop_from_cache(folder / "model.safetensors")
    rows["mapped, not in the page cache"] = run(FIRST_TOKEN, folder, "mapped")
    size = (folder / "model.safetensors").stat().st_size
    limit = int(400e6)
    if size > limit:
        drop_from_cache(folder / "model.safetensors")
        try:
            with MemoryGroup(limit) as group:
                rows[f"mapped, in a control group of {limit / 1e6:.0f} MB"] = run(
                    FIRST_TOKEN, folder, "mapped", group=group
                )
        except OSError as error:
            print(f"not measured under a limit: {error}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default="smollm2,1.1b,3b")
    parser.add_argument("--parts", default="quantise,load")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.models.split(","):
        if name == "smollm2":
            source = options.work / "smollm2-f32"
            if not source.exists():
                export(data.smollm2_gguf(), source, "f32")
            print("smollm2 from GGUF", flush=True)
            results["smollm2, GGUF Q4_1"] = {
                "source": data.smollm2_gguf().stat().st_size,
                "quantise": quantising(data.smollm2_gguf(), options.work / "smollm2-q4_1"),
            }
        else:
            source = synthetic.write(options.work / name, name)
        target = options.work / f"{name}-int4"
        print(name, flush=True)
        row = results.setdefault(name, {})
        row["source"] = sum(file.stat().st_size for file in files(source))
        if "quantise" in options.parts:
            row["quantise"] = quantising(source, target)
        row["packed"] = (target / "model.safetensors").stat().st_size
        if "load" in options.parts:
            row["load"] = loading(target)
        print(json.dumps(row, indent=1), flush=True)
        results = dict(sorted(results.items(), key=lambda item: item[1]["source"]))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


def page(results: dict) -> str:
    cpu, threads = limits.cpu_name(), torch.get_num_threads()
    lines = [
        "# From files to tokens: time and memory",
        "",
        f"Written by `python -m benchmarks.bench_files`: {cpu}, {threads} threads, torch "
        f"{torch.__version__}, memlm {memlm.__version__}; medians of {REPEATS}, each run a process of "
        "its own.  *smollm2* is the real one; the others have random weights and the shapes of "
        "TinyLlama-1.1B and Llama-3.2-3B, bf16, in shards of 2 GB.",
        "",
        "## memlm quantize, int4 with int8 embeddings",
        "",
        "*Peak* is the process's resident memory, torch included (about 225 MB); *copy* reads the same "
        "bytes and writes as many as the result has.  Cold: the source is not in the page cache.",
        "",
        "| model | read, MB | peak, MB | warm, s | copy, s | cold, s | copy, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results.items():
        warm, cold = row["quantise"]["warm"], row["quantise"]["cold"]
        lines.append(
            f"| {name} | {row['source'] / 1e6:,.0f} | {max(warm['peak'], cold['peak']) / 1e6:,.0f} | "
            f"{warm['s']:.2f} | {warm['copy_s']:.2f} | {cold['s']:.2f} | {cold['copy_s']:.2f} |"
        )
    lines += [
        "",
        "## From load to tokens",
        "",
        "*First*: seconds from `import memlm` (torch being imported) to the first token after a prompt "
        "of 5; *decode*: tokens per second after it; *mapped*: pages of the file in this process, shared "
        "with others; *private*: copies of such pages; *anonymous*: all other memory, torch's included.",
        "",
        "| model | weights, MB | pages | first, s | decode | mapped, MB | private, MB | anonymous, MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results.items():
        for how, m in row.get("load", {}).items():
            lines.append(
                f"| {name} | {row['packed'] / 1e6:,.0f} | {how} | {m['first_s']:.2f} | "
                f"{m['decode_tps']:.1f} | {m['mapped'] / 1e6:,.0f} | {m['private'] / 1e6:,.1f} | "
                f"{m['anonymous'] / 1e6:,.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
