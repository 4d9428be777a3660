"""The GPU's kernels against torch's and Marlin's: ``python -m benchmarks.bench_gpu [--only REGEX] [--record]``.

A candidate's calls are captured in a graph, one after the other over as many copies of weights, or of cached
keys and values, as are twice the L2 cache: these come from memory, as in a model, while code, inputs and results
are where a model has them; and the host is not measured.  Candidates take turns; reported is the median.
Limits, of reading and writing memory and of torch's f16 product, are measured in the same run.  A result is
compared with the product in f64 of the weights that were packed before anything is timed.

Marlin (github.com/IST-DASLab/marlin) takes part where it is installed; torch's int4 product is that of
tinygemm.  ``--record`` adds what was measured, with device, driver and commit, to benchmarks/results/gpu.json
and writes the last run into docs/gpu.md and docs/gpu.png.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.table import Table
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

import memlm
from benchmarks import harness, plots
from memlm import formats
from memlm.formats import Format, Packed
from memlm.kv_formats import KvFormat
from memlm.ops import implementations
from memlm.ops._matmul import codebook_index

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
PICTURE = PAGE.with_suffix(".png")
BEGIN, END = "<!-- begin: benchmarks/bench_gpu.py -->\n", "<!-- end: benchmarks/bench_gpu.py -->\n"
ROUNDS = 20
LEAST_CALLS = 16  # in a graph, so that its start does not count
WAIT = 200_000  # cycles of the GPU, about 0.1 ms, before a graph: the host queues it meanwhile

FORMATS = {"w2_matmul": ("int2a-g64",), "w4_matmul": ("int4-g128", "nf4-g64"), "w8_matmul": ("int8-row",)}
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # n, k: of an 8B model's layers
MS = (1, 16, 512)
# Relative error, Frobenius norm, of a sum of f16 products rounded once; and of int8 activations.
ROUNDED, INT8 = 2e-3, 2e-2


@dataclass
class Call:
    """``run(*reads)``; ``reads``: what comes from memory in a model, each time."""

    run: Callable[..., torch.Tensor]
    reads: tuple[torch.Tensor | None, ...] = ()

    def __call__(self) -> torch.Tensor:
        return self.run(*self.reads)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.reads if t is not None)

    def copy(self) -> Call:
        return Call(self.run, tuple(t if t is None else t.clone() for t in self.reads))


@dataclass
class Problem:
    """``calls``: by name, what computes it; ``exact``: the result in f64; ``bytes`` that must be moved and
    multiply-adds of one call."""

    op: str
    case: str
    bytes: int
    macs: int
    error: float
    exact: torch.Tensor
    calls: dict[str, Call] = field(default_factory=dict)


def kernels(op: str, device: str) -> dict[str, Callable]:
    """memlm's, by name, without the reference."""
    found = implementations(op, torch.device(device).type)
    return {f"memlm {name}": run for name, run in found.items() if name != "reference"}


def _arguments(op: str, x: torch.Tensor, w: Packed, codes, scales, offsets) -> tuple:
    """Of the op, as its schema has them; of ``w`` what it says of its tensors, which follow."""
    sizes, around = (w.n, w.k, w.format.group), (None, 0.0, False, None)
    if op == "w8a8_matmul":
        return (x, None, codes, scales, *sizes, None, w.format.group and 32, *around, None)
    offsets = () if op == "w8_matmul" else (offsets,)
    book = (codebook_index(w.format.codebook),) if op == "w4_matmul" else ()
    return (x, codes, scales, *offsets, *book, *sizes, None, False, *around)


@functools.lru_cache(1)  # for the numbers of rows of one matrix
def _weights(format: str, n: int, k: int, device: str) -> tuple[Packed, torch.Tensor]:
    """Packed, and in f32 on the device."""
    random = torch.Generator().manual_seed(0)
    packed = memlm.quantize_weight(torch.randn(n, k, generator=random) / k**0.5, Format.parse(format))
    return packed, formats.dequantize(packed, torch.float32).to(device)


def matmul(op: str, format: str, m: int, n: int, k: int, device: str, dtype=torch.float16) -> Problem:
    packed, w = _weights(format, n, k, device)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(device, dtype)
    exact = x.double() @ w.double().T
    moved = packed.nbytes + (m * k + m * n) * x.element_size()
    error = INT8 if op == "w8a8_matmul" else ROUNDED
    problem = Problem(op, f"{format} {n}x{k}, m={m}", moved, m * n * k, error, exact)
    parts = [t if t is None else t.to(device) for t in (packed.codes, packed.scales, packed.offsets)]
    for name, run in kernels(op, device).items():
        problem.calls[name] = Call(lambda *w, run=run: run(*_arguments(op, x, packed, *w)), tuple(parts))
    problem.calls["torch f16"] = Call(lambda dense: x @ dense.T, (w.to(dtype),))
    if op == "w4_matmul" and format == "int4-g128":
        _int4_rivals(problem, x, w, packed)
    return problem


def _int4_rivals(problem: Problem, x: torch.Tensor, w: torch.Tensor, packed: Packed) -> None:
    """Other packings of the same numbers."""
    codes, scales, _ = formats.unpack(packed)
    if x.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(x.device)
        tiles = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        scales = scales.to(x.device)
        pairs = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).bfloat16().contiguous()
        wide = x.bfloat16()
        problem.calls["torch int4"] = Call(
            lambda tiles, pairs: torch.ops.aten._weight_int4pack_mm(wide, tiles, 128, pairs), (tiles, pairs)
        )
    if x.is_cuda and importlib.util.find_spec("marlin"):
        import marlin

        layer = marlin.Layer(packed.k, packed.n, 128)
        linear = torch.nn.Linear(packed.k, packed.n, bias=False, dtype=torch.float16)
        linear.weight.data = w.half().cpu()
        layer.pack(linear, scales.half().cpu())
        layer = layer.to(x.device)
        y = torch.empty(len(x), packed.n, dtype=torch.float16, device=x.device)
        problem.calls["marlin"] = Call(
            lambda b, s: marlin.mul(x, b, y, s, layer.workspace) or y, (layer.B, layer.s)
        )


def attention(length: int, heads: int, kv_heads: int, dim: int, device: str) -> Problem:
    random = torch.Generator().manual_seed(length)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(1, length, count, dim, generator=random).to(device, torch.float16).transpose(1, 2)

    q, k, v = normal(heads), normal(kv_heads), normal(kv_heads)
    wide = (t.double().repeat_interleave(heads // t.shape[1], 1) for t in (q, k, v))
    exact = F.scaled_dot_product_attention(*wide, is_causal=True)
    size = 2 * length * dim * (2 * heads + 2 * kv_heads)
    case = f"causal, {length} tokens, {heads}/{kv_heads} heads of {dim}"
    problem = Problem("attention", case, size, heads * length**2 * dim, ROUNDED, exact)
    rules = (None, None, 0, None, None, dim**-0.5, -1, 0, False, 0.0, None, None, 0.0, None)
    for name, run in kernels("attention", device).items():
        problem.calls[name] = Call(lambda run=run: run(q, k, v, *rules)[0])
    problem.calls["torch f16"] = Call(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    return problem


def paged_attention(type: str, sequences: int, length: int, heads: int, kv_heads: int, dim: int, device: str) -> Problem:
    """One new token of each sequence."""
    format, random = KvFormat(type, 64, dim), torch.Generator().manual_seed(length)
    blocks = length // format.tokens
    total = sequences * length
    k, v = torch.randn(2, total, kv_heads, dim, generator=random).half()
    q = torch.randn(sequences, heads, dim, generator=random).half()
    pool = torch.zeros(kv_heads, sequences * blocks, format.block_bytes, dtype=torch.uint8)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    tails = tail_of = None
    if format.tail:
        tails = torch.zeros(kv_heads, sequences, format.tail.block_bytes, dtype=torch.uint8)
        tail_of = torch.arange(sequences, dtype=torch.int32)
    lengths = torch.full((sequences,), length)
    where = (lengths, tables, tail_of, format.index, format.tokens)
    implementations("kv_append")["cpp"](pool, tails, k, v, torch.arange(sequences + 1) * length, *where)
    given = (q, pool, tails, torch.arange(sequences + 1), *where, dim**-0.5, 0, 0.0, None, None)
    exact = implementations("paged_attention")["reference"](*given).double().to(device)
    here = [t.to(device) if isinstance(t, torch.Tensor) else t for t in given]
    size = pool.nbytes + 4 * q.numel()
    case = f"{type}, {sequences} x {length} tokens, {heads}/{kv_heads} heads of {dim}"
    problem = Problem("paged_attention", case, size, 2 * heads * total * dim, INT8, exact)
    for name, run in kernels("paged_attention", device).items():
        problem.calls[name] = Call(lambda pool, run=run: run(here[0], pool, *here[2:]), (here[1],))
    if type == "bf16":  # of keys and values that lie together
        parts = (t.view(sequences, length, kv_heads, dim).transpose(1, 2).to(device) for t in (k, v))
        new = q[:, :, None].to(device)
        problem.calls["torch f16"] = Call(
            lambda k, v: F.scaled_dot_product_attention(new, k, v, enable_gqa=True)[:, :, 0], tuple(parts)
        )
    return problem


def problems(device: str) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Their names, and what makes them."""
    for op, names in (*FORMATS.items(), ("w8a8_matmul", ("int8-row",))):
        for format in names:
            for n, k in SHAPES:
                for m in MS:
                    given = (op, format, m, n, k, device)
                    yield f"{op} {format} {n}x{k} m={m}", lambda given=given: matmul(*given)
    for length in (1024, 8192):
        yield f"attention {length}", lambda length=length: attention(length, 32, 8, 128, device)
    for type in ("bf16", "int8", "int4"):
        given = (type, 16, 4096, 32, 8, 128, device)
        yield f"paged_attention {type}", lambda given=given: paged_attention(*given)


class Gpu:
    """Times calls on the current device."""

    def __init__(self):
        properties = torch.cuda.get_device_properties("cuda")
        self.name, self.cache = properties.name, properties.L2_cache_size

    def ready(self, call: Call) -> Callable[[], float]:
        """What measures the microseconds of one call, among many."""
        count = -(-2 * self.cache // call.nbytes) if call.nbytes else 1
        calls = [call, *(call.copy() for _ in range(count - 1))]
        calls *= -(-LEAST_CALLS // count)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        with torch.cuda.graph(graph):
            for each in calls:
                each()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def us() -> float:
            torch.cuda._sleep(WAIT)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return 1e3 * begin.elapsed_time(end) / len(calls)

        us()
        return us

    def limits(self) -> tuple[float, float]:
        """Bytes, and multiply-adds of f16, that a microsecond can do."""
        source = torch.ones(1 << 27, device="cuda")
        to, square = torch.empty_like(source), torch.randn(8192, 8192, device="cuda").half()
        copied, multiplied = (
            statistics.median(us() for _ in range(3))
            for us in (
                # A kernel: a graph would give a copy to the copy engine, which is slower.
                self.ready(Call(lambda: torch.neg(source, out=to))),
                self.ready(Call(lambda: square @ square)),
            )
        )
        return 2 * source.nbytes / copied, 8192**3 / multiplied


class Cpu:
    """The same for tests: no rate is measured."""

    name = "cpu"

    def ready(self, call: Call) -> Callable[[], float]:
        def us() -> float:
            start = time.perf_counter()
            call.copy()()
            return 1e6 * (time.perf_counter() - start)

        return us

    def limits(self) -> tuple[float, float]:
        return 1.0, 1.0


def measured(problem: Problem, timer: Gpu | Cpu, limits: tuple[float, float], rounds: int) -> list[dict]:
    """A row for each call that can run.  Raises AssertionError for a wrong result of memlm's."""
    errors = {}
    for name, call in list(problem.calls.items()):
        try:
            y = call()
        except RuntimeError as error:
            if name.startswith("memlm"):
                raise
            harness.out.print(f"{name}: not for {problem.op} {problem.case}: {str(error).splitlines()[0]}")
            del problem.calls[name]
            continue
        errors[name] = float((y.double() - problem.exact).norm() / problem.exact.norm())
        if not errors[name] < problem.error and name.startswith("memlm"):
            raise AssertionError(f"{name} {problem.op} {problem.case}: relative error {errors[name]:.3g}, "
                                 f"expected below {problem.error}")  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in problem.calls}
    timed = {name: timer.ready(call) for name, call in problem.calls.items()}
    for _ in range(rounds):
        for name, us in timed.items():
            times[name].append(us())
    least = max(problem.bytes / limits[0], problem.macs / limits[1])
    return [
        {
            "op": problem.op, "case": problem.case, "impl": name, "us": (us := statistics.median(found)),
            "of_limit": least / us, "error": errors[name], "bytes": problem.bytes, "macs": problem.macs,
        }
        for name, found in times.items()
    ]  # fmt: skip


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


HEAD = ("operation", "case", "kernel", "µs", "of the limit", "error")


def cells(row: dict) -> list[str]:
    return [row["op"], row["case"], row["impl"], f"{row['us']:.1f}", f"{row['of_limit']:.0%}", f"{row['error']:.1e}"]


def plot(run: dict) -> None:
    """The speed of products by a matrix of an 8B model, beside torch's of f16."""
    plt = plots.pyplot()
    if plt is None:
        return
    n, k = SHAPES[1]
    figure, panels = plt.subplots(1, len(MS), figsize=(12, 4), sharey=True)
    for m, axes in zip(MS, panels):
        rows = [row for row in run["rows"] if row["case"].endswith(f" {n}x{k}, m={m}")]
        formats = list(dict.fromkeys((row["op"], row["case"].split()[0]) for row in rows))
        impls = [i for i in dict.fromkeys(row["impl"] for row in rows) if i != "torch f16"]
        us = {(row["op"], row["case"].split()[0], row["impl"]): row["us"] for row in rows}
        width = 0.8 / max(1, len(impls))
        for i, impl in enumerate(impls):
            have = [(at, f) for at, f in enumerate(formats) if (*f, impl) in us]
            speeds = [us[(*f, "torch f16")] / us[(*f, impl)] for _, f in have]
            axes.bar([at + (i + 0.5) * width - 0.4 for at, _ in have], speeds, width, label=impl)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(formats)), ["\n".join(f) for f in formats], fontsize=7)
        axes.set_title(f"{m} token{'s' * (m > 1)}")
    panels[0].set_ylabel(f"speed beside torch's f16 product, {n} x {k}")
    if handles := panels[-1].get_legend_handles_labels()[0]:
        panels[-1].legend(handles=handles, fontsize=8)
    figure.suptitle(run["device"])
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def record(run: dict) -> None:
    """Keeps a run, and writes it where people look."""
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*runs, run], indent=1) + "\n")
    harness.put_between(PAGE, BEGIN, END, page(run))
    plot(run)


def page(run: dict) -> str:
    """The last run, for docs/gpu.md."""
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, run["rows"])]
    about = f"{run['device']}, driver {run['driver']}, torch {run['torch']}, memlm {run['commit']}, {run['date']}"
    limits = f"limits {run['gbps']:,.0f} GB/s and {run['tmacs']:,.0f} T multiply-adds/s of f16"
    return f"{about}; {limits}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="problems to measure")
    parser.add_argument("--record", action="store_true", help="keep the results, and write docs/gpu.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that this torch can use")
    timer = Gpu()
    limits, rows = timer.limits(), []
    shown = Table(*HEAD, title=timer.name)
    for name, make in problems("cuda"):
        if re.search(options.only, name):
            harness.out.print(name)
            rows += measured(make(), timer, limits, ROUNDS)
    for row in rows:
        shown.add_row(*cells(row))
    harness.out.print(shown)
    if options.record:
        run = harness.run() | {
            "device": timer.name, "driver": driver(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            "gbps": limits[0] / 1e3, "tmacs": limits[1] / 1e6, "rows": rows,
        }  # fmt: skip
        record(run)


if __name__ == "__main__":
    main()
