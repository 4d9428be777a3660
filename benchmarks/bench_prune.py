"""What pruning costs: quality by method, pattern and level, time and memory.  docs/pruning.md.

    python -m benchmarks.bench_prune [--only REGEX] [--minutes M] [--again] [--record]

Every case is a process of its own, and its result is kept in benchmarks/results/prune.json: the
next call goes on with what is missing, and --record writes the page from what is there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import memlm
from benchmarks import harness, plots
from benchmarks.snippets import movie_snippets
from memlm import cpu, data, limits, memory, report
from memlm.models.evaluate import WINDOW, evaluate
from memlm.prune import PruneConfig
from memlm.prune.calibration import Walk, batches_of, in_f32
from memlm.prune.families import family_of
from memlm.prune.sparsegpt import inverse_factor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "prune.json"
PAGE, PICTURE = ROOT / "docs" / "pruning.md", ROOT / "docs" / "pruning.png"
METHODS = ("magnitude", "wanda", "sparsegpt")
# Calibration: pieces of so many tokens.  With 16 SparseGPT fits them so well that it loses elsewhere
# (perplexity 144.0 beside Wanda's 134.6).  The decoder's full ones, as many as the papers take, are for
# the measurement of time and memory.
PIECES, ENCODER_PIECES, FULL_PIECES, ENCODER_LENGTH = 48, 128, 128, 128
WINDOWS = 8  # of the evaluation
SENTENCES, TRAIN, TEST = 256, 2000, 500
PENALTY = 1e-2  # of the probe's ridge regression, on unit vectors


@dataclass(frozen=True)
class Case:
    model: str  # "decoder", "encoder" or "cost"
    method: str
    pattern: str
    sparsity: float
    format: str | None = None
    allocation: str = "uniform"

    @property
    def key(self) -> str:
        return "/".join(str(value) for value in asdict(self).values())

    def config(self, samples: int, length: int) -> PruneConfig:
        settings = {k: v for k, v in asdict(self).items() if k != "model"}
        return PruneConfig(**settings, samples=samples, length=length)


def _cases() -> list[Case]:
    levels = (("unstructured", 0.5), ("block", 0.3), ("2:4", 0.5), ("unstructured", 0.7),
              ("block", 0.5), ("unstructured", 0.3))  # fmt: skip
    cases = [Case("encoder", m, *level) for level in levels for m in METHODS]
    cases += [Case("decoder", m, *level) for level in levels for m in METHODS]
    for model in ("encoder", "decoder"):
        cases += [
            Case(model, "sparsegpt", pattern, level, allocation="sensitivity")
            for pattern, level in (("unstructured", 0.5), ("unstructured", 0.7), ("block", 0.3))
        ]
        cases += [
            Case(model, method, pattern, level, "int4")
            for pattern, level in (("unstructured", 0.5), ("2:4", 0.5), ("block", 0.3))
            for method in ("sparsegpt", "wanda")
        ]
    return [Case("cost", "sparsegpt", "unstructured", 0.5), *cases]


CASES = _cases()


def _prune(model, case: Case, samples: int, length: int) -> dict:
    """Prunes; what of it there is to tell."""
    memory.reset_peak()
    start = time.perf_counter()
    done = memlm.prune_(model, case.config(samples, length), data.state_of_the_union())
    return {
        "seconds": time.perf_counter() - start,
        "peak": memory.peak_bytes(),
        "zeros": done.sparsity,
        "error": sum(layer.error for layer in done.layers) / len(done.layers),
        "bytes": done.bytes,
        "dense_bytes": done.dense_bytes,
        "samples": samples,
        "threads": torch.get_num_threads(),
    }


def smollm2(dequantize: bool = False):
    """Its float weights in bf16; the layers come packed, as the file has them, and are floats from
    when they are pruned."""
    return memlm.load(data.smollm2_gguf(), torch.bfloat16, dequantize=dequantize)


def decoder(case: Case) -> dict:
    model = smollm2()
    result = _prune(model, case, PIECES, WINDOW)
    ids = model.tokenizer.encode(data.moby_dick())[: WINDOWS * WINDOW]
    score = evaluate(model, ids, smollm2(dequantize=True))
    return {**result, **asdict(score)}


def encoder(case: Case) -> dict:
    model, base = memlm.load(data.minilm()), memlm.load(data.minilm())
    result = _prune(model, case, ENCODER_PIECES, ENCODER_LENGTH)
    texts = [s.strip() for s in data.moby_dick()[:400_000].split(". ") if 40 < len(s) < 300]
    found, exact = (m.embed(texts[:SENTENCES]) for m in (model, base))
    return {
        **result,
        "cosine": (found * exact).sum(-1).mean().item(),
        "probe": probe(model),
    }


def probe(model) -> float:
    """Share of the test snippets whose sentiment a linear probe on their embeddings finds."""
    rated = [(text, rating) for text, rating in movie_snippets() if abs(rating) >= 0.5]
    order = torch.randperm(len(rated), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [rated[i] for i in order[: TRAIN + TEST]]
    x = model.embed([text for text, _ in chosen]).double()
    x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
    y = torch.tensor([rating for _, rating in chosen]).sign().double()
    gram = x[:TRAIN].T @ x[:TRAIN] + PENALTY * torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(gram, x[:TRAIN].T @ y[:TRAIN])
    return ((x[TRAIN:] @ weights).sign() == y[TRAIN:]).double().mean().item()


def cost(case: Case) -> dict:
    """SparseGPT with the papers' calibration beside a plain forward pass over it, in one layer, and
    the factors that its four inputs need."""
    text, layers = data.state_of_the_union(), 3
    model, ends = smollm2(), []
    memory.reset_peak()
    start = time.perf_counter()
    memlm.prune_(
        model, case.config(FULL_PIECES, WINDOW), text,
        lambda done, *_: ends.append(time.perf_counter()) if done % 4 == 0 else None,
    )  # fmt: skip
    seconds, peak = time.perf_counter() - start, memory.peak_bytes()
    # From the first layer's last linear layer on: tokenising is not a layer's work.
    layer = (ends[layers] - ends[0]) / layers
    model = smollm2()
    walk = Walk(family_of(model), batches_of(model, text, FULL_PIECES, WINDOW))
    floats = memlm.dequantize_(model, torch.bfloat16)
    forward, factor = [], 0.0
    with torch.no_grad():
        for i in range(layers):
            with in_f32(floats.layers[i]):
                start = time.perf_counter()
                walk.advance(i)
                forward.append(time.perf_counter() - start)
    width, inner = model.config.hidden_size, model.config.intermediate_size
    for k in (width, width, width, inner):
        x = torch.randn(2 * k, k).double()
        start = time.perf_counter()
        inverse_factor(x.T @ x, 0.01)
        factor += time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak": peak,
        "layer": layer,
        "forward": sorted(forward)[layers // 2],
        "factor": factor,
        "samples": FULL_PIECES,
        "threads": torch.get_num_threads(),
    }


WORK: dict[str, Callable[[Case], dict]] = {"decoder": decoder, "encoder": encoder, "cost": cost}


def dense() -> dict:
    """What the models are as they are."""
    base = smollm2(dequantize=True)
    ids = base.tokenizer.encode(data.moby_dick())[: WINDOWS * WINDOW]
    return {
        "perplexity": evaluate(base, ids).perplexity,
        "probe": probe(memlm.load(data.minilm())),
        "where": f"{limits.cpu_name()} ({cpu.isa()}), torch {torch.__version__}",
    }


def measure(key: str, threads: int) -> dict:
    """One case, or "dense", in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_prune", "--worker", key]
    done = subprocess.run(
        [*command, "--threads", str(threads)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{key}: failed")
    return json.loads(done.stdout.splitlines()[-1])


def worker(key: str) -> None:
    memory.return_freed()
    if key == "dense":
        result = dense()
    else:
        case = next(case for case in CASES if case.key == key)
        result = WORK[case.model](case)
    print(json.dumps(result))


def _share(result: dict) -> str:
    return f"{result['bytes'] / 1e6:.1f} ({result['bytes'] / result['dense_bytes']:.2f})"


COMMON = (
    ("method", "", lambda r: r["case"].method),
    ("pattern", "", lambda r: r["case"].pattern),
    ("zeros", "%", lambda r: f"{100 * r['zeros']:.1f}"),
    ("allocation", "", lambda r: r["case"].allocation),
    ("values", "", lambda r: r["case"].format or "float"),
)
DECODER_COLUMNS = (
    *COMMON,
    ("perplexity", "", lambda r: f"{r['perplexity']:.2f}"),
    ("KL", "nats", lambda r: f"{r['kl']:.3f}"),
    ("same top", "%", lambda r: f"{100 * r['agreement']:.1f}"),
    ("layers' error", "mean", lambda r: f"{r['error']:.3f}"),
    ("layers", "MB (of dense)", _share),
    ("time", "s", lambda r: f"{r['seconds']:.0f}"),
    ("peak", "MB", lambda r: f"{r['peak'] / 1e6:.0f}"),
)
ENCODER_COLUMNS = (
    *COMMON,
    ("cosine to dense", "mean", lambda r: f"{r['cosine']:.4f}"),
    ("probe", "%", lambda r: f"{100 * r['probe']:.1f}"),
    ("layers' error", "mean", lambda r: f"{r['error']:.3f}"),
    ("layers", "MB (of dense)", _share),
    ("time", "s", lambda r: f"{r['seconds']:.1f}"),
    ("peak", "MB", lambda r: f"{r['peak'] / 1e6:.0f}"),
)


def rows_of(model: str, results: dict[str, dict]) -> list[dict]:
    cases = [case for case in CASES if case.model == model and case.key in results]
    order = {method: i for i, method in enumerate(METHODS)}
    cases.sort(key=lambda c: (c.format or "", c.pattern, c.sparsity, order[c.method], c.allocation))
    return [{**results[case.key], "case": case} for case in cases]


def write(results: dict[str, dict]) -> None:
    """Puts what is there into docs/pruning.md, and draws it."""
    known = results["dense"]
    text = f"{known['where']}.\n"
    rows = rows_of("decoder", results)
    if rows:
        text += (
            f"\n### SmolLM2-135M\n\nDense: perplexity {known['perplexity']:.2f}.\n\n"
            f"{report.markdown_table(DECODER_COLUMNS, rows)}\n"
        )
    rows = rows_of("encoder", results)
    if rows:
        text += (
            f"\n### MiniLM-L6\n\nDense: the probe is right for {known['probe']:.1%}.\n\n"
            f"{report.markdown_table(ENCODER_COLUMNS, rows)}\n"
        )
    for found in rows_of("cost", results):
        allowed = 3 * found["forward"] + found["factor"]
        text += (
            f"\n### Time and memory\n\nSparseGPT on SmolLM2, {found['samples']} pieces of {WINDOW} "
            f"tokens, {found['threads']} threads: {found['layer']:.2f} s for a layer, where a "
            f"plain forward pass of it takes {found['forward']:.2f} s and the Cholesky factors "
            f"{found['factor']:.2f} s ({found['layer'] / allowed:.2f} of three forward passes and "
            f"the factors); {found['seconds']:.0f} s and a peak of {found['peak'] / 1e6:.0f} MB "
            "resident for all of it.\n"
        )
    harness.put_between(PAGE, "<!-- measured -->\n", "<!-- end -->\n", text)
    draw(results)


def draw(results: dict[str, dict]) -> None:
    plt = plots.pyplot()
    if plt is None:
        return
    colours = dict(zip(METHODS, ("#9aa5b1", "#3e7cb1", "#d1495b")))
    styles = {"unstructured": ("o", "-"), "block": ("s", "--"), "2:4": ("^", "")}
    panels = (("decoder", "perplexity", "SmolLM2: perplexity", True),
              ("encoder", "cosine", "MiniLM: cosine to dense", False),
              ("encoder", "probe", "MiniLM: probe's accuracy", False))  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for axis, (model, value, title, log) in zip(axes, panels):
        rows = [r for r in rows_of(model, results) if r["case"].format is None]
        level = results["dense"].get(value, 1.0)
        for method in METHODS:
            for pattern, (marker, line) in styles.items():
                chosen = [
                    r for r in rows if (r["case"].method, r["case"].pattern) == (method, pattern)
                ]
                even = [(r["zeros"], r[value]) for r in chosen if r["case"].allocation == "uniform"]
                style = {"color": colours[method], "marker": marker, "markersize": 5}
                if even:
                    start = [(0, level)] if line else []
                    axis.plot(*zip(*start, *sorted(even)), linestyle=line, **style,
                              label=f"{method}, {pattern}")  # fmt: skip
                for r in chosen:
                    if r["case"].allocation != "uniform":
                        axis.plot(r["zeros"], r[value], **style, markerfacecolor="white")
        axis.axhline(level, color="black", linewidth=1, linestyle=":", label="dense")
        if log:
            axis.set_yscale("log")
        axis.set(title=title, xlabel="share of zeros")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1].get_legend_handles_labels()
    if handles:
        title = "hollow: by sensitivity"
        figure.legend(handles, labels, title=title, title_fontsize=8, fontsize=8, frameon=False,
                      loc="outside right center")  # fmt: skip
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression, searched in cases' keys")
    parser.add_argument("--minutes", type=float, default=1e9, help="begins no case after these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument("--record", action="store_true", help="writes the page")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        return worker(given.worker)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    end = time.monotonic() + 60 * given.minutes
    for key in ("dense", *(case.key for case in CASES)):
        wanted = key == "dense" or re.search(given.only, key)
        if not wanted or (key in results and not (given.again and key != "dense")):
            continue
        if time.monotonic() > end:
            break
        results[key] = measure(key, given.threads)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(key, results[key], file=sys.stderr, flush=True)
    if given.record:
        write(results)


if __name__ == "__main__":
    main()
