"""Structured removal, and recovery of a block-sparse model: docs/recovery.md.

    python -m benchmarks.bench_recover [--only REGEX] [--record]

The parts can run one by one (``--only 0.3``, ``structured``, ``encoder``): with --record each keeps
its results in benchmarks/results/recover.json, and the page is written from all that are there.
Calibration and training see State of the Union addresses, evaluation Moby-Dick.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from pathlib import Path

import torch

import memlm
from benchmarks import harness, plots
from memlm import data
from memlm.models.decoder import Decoder
from memlm.models.evaluate import WINDOW, Score, evaluate
from memlm.prune import PruneConfig, recover_, remove_

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "recovery.md", ROOT / "benchmarks" / "results" / "recover.json"
PICTURE = ROOT / "docs" / "recovery.png"
SAMPLES = 32  # pieces of WINDOW tokens to calibrate on
TOKENS = 8 * WINDOW  # to judge on
SENTENCES = 256
METHOD = "sparsegpt"
TRAINING = {"steps": 120, "batch": 2, "window": 256, "lr": 1e-3}
EVERY = 20  # steps between evaluations
DENSE, TEXT = "the dense model", "the text alone"
# The share of blocks that is taken out, and what the rest is trained towards.
RECOVERIES = ((0.3, DENSE), (0.3, TEXT), (0.5, DENSE))

DECODER = {
    "2 of 30 layers": {"layers": 2},
    "4 of 30 layers": {"layers": 4},
    "6 of 30 layers": {"layers": 6},
    "10 % of the channels": {"channels": 0.1},
    "25 % of the channels": {"channels": 0.25},
    "1 of 3 key-value heads": {"heads": 1},
}
ENCODER = {
    "10 % of the channels": {"channels": 0.1},
    "25 % of the channels": {"channels": 0.25},
    "2 of 12 heads": {"heads": 2},
    "4 of 12 heads": {"heads": 4},
    "1 of 6 layers": {"layers": 1},
}


def smollm2() -> Decoder:
    return memlm.load(data.smollm2_gguf(), torch.float32, dequantize=True)


def say(row: dict) -> dict:
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def quality(score: Score) -> dict:
    return {"perplexity": score.perplexity, "kl": score.kl, "agreement": score.agreement}


def recovery(sparsity: float, towards: str) -> dict:
    """SmolLM2 with so many of its blocks taken out, and what training makes of it."""
    base, speeches = smollm2(), data.state_of_the_union()
    training = base.tokenizer.encode(speeches)
    ids = base.tokenizer.encode(data.moby_dick())[:TOKENS]
    # The file's codes take a fifth of the memory.
    teacher = memlm.load(data.smollm2_gguf()) if towards == DENSE else None
    model = smollm2()
    config = PruneConfig(METHOD, sparsity, "block", samples=SAMPLES, length=WINDOW)
    memlm.prune_(model, config, speeches)
    curve, start = [[0, say(quality(evaluate(model, ids, base)))]], time.perf_counter()

    def look(done: int, steps: int, loss: str) -> None:
        print(done, loss, file=sys.stderr, flush=True)
        if done % EVERY == 0:
            curve.append([done, say(quality(evaluate(model, ids, base)))])

    losses = recover_(model, training, teacher, progress=look, **TRAINING)
    seconds = time.perf_counter() - start
    memlm.sparsify_(model, "block/int8", strict=True)
    return {
        "sparsity": sparsity,
        "towards": towards,
        "curve": curve,
        "losses": losses,
        "seconds": seconds,
        "int8": say(quality(evaluate(model, ids, base))),
    }


def structured() -> list[dict]:
    """SmolLM2 without parts, with and without the others' update."""
    base, speeches = smollm2(), data.state_of_the_union()
    pieces = base.tokenizer.encode(speeches)
    starts = torch.linspace(0, len(pieces) - WINDOW, SAMPLES).long().tolist()
    calibration = [torch.tensor([pieces[start : start + WINDOW]]) for start in starts]
    ids = base.tokenizer.encode(data.moby_dick())[:TOKENS]
    rows = [{"removed": "nothing", "parameters": 1.0, **quality(evaluate(base, ids, base))}]
    for name, sizes, update in variants(DECODER):
        model, start = smollm2(), time.perf_counter()
        removal = remove_(model, calibration, **sizes, compensate=update is not False)
        seconds = time.perf_counter() - start
        about = {
            "removed": name,
            "update": update,
            "layers": removal.layers,
            "parameters": removal.parameters / removal.before,
            "seconds": seconds,
        }
        rows.append(say(about | quality(evaluate(model, ids, base))))
    return rows


def variants(cases: dict[str, dict]):
    """(name, sizes, whether what stays is updated; None: there is nothing to update)."""
    for name, sizes in cases.items():
        for update in (None,) if "layers" in sizes else (False, True):
            yield name, sizes, update


def sentences(text: str, count: int) -> list[str]:
    found = [s.strip() for s in text.split(". ") if 40 < len(s) < 300]
    return found[:: len(found) // count][:count]


def encoder() -> list[dict]:
    """MiniLM without parts: how far embeddings move."""
    base = memlm.load(data.minilm())
    texts = sentences(data.moby_dick(), SENTENCES)
    calibration = sentences(data.state_of_the_union(), 4 * SENTENCES)
    exact, rows = base.embed(texts), []
    for name, sizes, update in variants(ENCODER):
        model = memlm.load(data.minilm())
        removal = remove_(model, calibration, **sizes, compensate=update is not False)
        vectors = model.embed(texts)
        cosine = (vectors * exact).sum(-1)
        nearest = [(v @ v.T).fill_diagonal_(-1).argmax(-1) for v in (vectors, exact)]
        row = {
            "removed": name,
            "update": update,
            "parameters": removal.parameters / removal.before,
            "cosine": cosine.mean().item(),
            "least": cosine.min().item(),
            "nearest": (nearest[0] == nearest[1]).float().mean().item(),
        }
        rows.append(say(row))
    return rows


PARTS = {
    "structured": structured,
    "encoder": encoder,
    **{
        f"recovery {share:g}, {towards}": functools.partial(recovery, share, towards)
        for share, towards in RECOVERIES
    },
}


def recoveries(results: dict) -> list[dict]:
    return [results[name] for name in PARTS if name.startswith("recovery") and name in results]


def draw(runs: list[dict]) -> None:
    """Divergence and perplexity over the steps."""
    if not (plt := plots.pyplot()):
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, label in (
        (axes[0], "kl", "KL(dense || model), nats per token"),
        (axes[1], "perplexity", "perplexity"),
    ):
        for run, style in zip(runs, ("o-", "s--", "^-")):
            steps, scores = zip(*run["curve"])
            name = f"{run['sparsity']:.0%} of the blocks, towards {run['towards']}"
            axis.plot(steps, [score[key] for score in scores], style, label=name)
        axis.set(xlabel="optimizer steps", ylabel=label)
        if key == "kl":
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.grid(which="both", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=9, frameon=False)
    title = "SmolLM2-135M without some of its 16x32 blocks, trained for a while, on Moby-Dick"
    figure.suptitle(title, x=0.01, ha="left")
    plots._finish(figure, PICTURE, plt)


def cells(score: dict) -> list[str]:
    return [f"{score['perplexity']:.1f}", f"{score['kl']:.3f}", f"{100 * score['agreement']:.1f}"]


def table(head: str, rows: list[list[str]], left: int = 1) -> str:
    columns = head.count("|") - 1
    align = " | ".join(["---"] * left + ["---:"] * (columns - left))
    return "\n".join([head, f"| {align} |", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def updated(row: dict) -> str:
    return {None: "", False: "no", True: "yes"}[row["update"]]


RECOVER = """```python
memlm.prune_(model, memlm.prune.PruneConfig("sparsegpt", 0.5, "block"), text)
memlm.prune.recover_(model, ids, teacher, steps=100)    # or without a teacher
memlm.sparsify_(model, "block/int8")
```"""
REMOVE = """```python
memlm.prune.remove_(model, text, heads=1, channels=0.25, layers=2)
memlm.save(model, "smaller/")        # generate, quantize_, export: a model like any other
```"""
GRADUAL = """```python
optimizer = torch.optim.AdamW(model.parameters())
pruning = memlm.prune.GradualPruning(model, optimizer, 0.5, end=1000, pattern="block")
...                                  # train as before: masks hold through the optimizer's steps
pruning.remove()                     # the zeros stay
memlm.sparsify_(model, "block/int8")
```"""


def page(results: dict) -> str:
    run = results["run"]
    parts = [
        "# Recovery, and structured removal",
        f"Written by `python -m benchmarks.bench_recover --record`: {run['device']} "
        f"({run['isa']}), torch {run['torch']}, memlm {run['memlm']}. Calibration and training see "
        f"State of the Union addresses, evaluation {TOKENS:,} tokens of Moby-Dick in windows of "
        f"{WINDOW}; KL and *same top* are against the dense f32 model.",
    ]
    if runs := recoveries(results):
        rows = []
        for one in runs:
            for step, score in one["curve"]:
                what = f"towards {one['towards']}" if step else "pruned"
                rows.append([f"{one['sparsity']:.0%}", what, str(step), *cells(score)])
            rows.append(["", "then block/int8", str(step), *cells(one["int8"])])
        tokens = TRAINING["batch"] * TRAINING["window"]
        parts += [
            "## Recovery",
            RECOVER,
            f"SmolLM2-135M: {METHOD} takes blocks of 16x32 weights out of all its layers "
            f"({SAMPLES} pieces of {WINDOW} tokens), then what stays is trained: "
            f"{TRAINING['steps']} steps of AdamW on {tokens} tokens each, learning rate "
            f"{TRAINING['lr']:g}. Towards the dense model: the divergence from its probabilities "
            "(arXiv:1503.02531); towards the text alone: cross entropy. The dense model is loaded "
            "in the codes of its file.",
            f"![KL and perplexity over the steps]({PICTURE.name})",
            table("| blocks taken out | | steps | perplexity | KL, nats | same top, % |", rows, 2),
        ]
    if rows := results.get("structured"):
        shown = [
            [r["removed"], updated(r) if "update" in r else "", f"{100 * r['parameters']:.1f}",
             *cells(r)]
            for r in rows
        ]  # fmt: skip
        parts += [
            "## Structured removal",
            REMOVE,
            "`memlm.prune.remove_`: what is left is a smaller dense model. Layers by block "
            "influence (ShortGPT, arXiv:2403.03853); channels and heads by what the layer that "
            "reads them loses, without and with a least-squares update of what stays "
            f"(arXiv:2302.04089), from {SAMPLES} pieces of {WINDOW} tokens; nothing was trained. The "
            "update's `damp` was once chosen on Moby-Dick, which flatters *updated* a little. "
            "SmolLM2-135M, of whose parameters the embedding is a fifth:",
            table("| removed | updated | parameters, % | perplexity | KL, nats | same top, % |",
                  shown, 2),
        ]  # fmt: skip
    if rows := results.get("encoder"):
        shown = [
            [r["removed"], updated(r), f"{100 * r['parameters']:.1f}", f"{r['cosine']:.4f}",
             f"{r['least']:.4f}", f"{100 * r['nearest']:.1f}"]
            for r in rows
        ]  # fmt: skip
        parts += [
            f"MiniLM, embeddings of {SENTENCES} sentences of Moby-Dick beside the whole model's, "
            "of whose parameters half are embeddings:",
            table("| removed | updated | parameters, % | cosine, mean | cosine, least | "
                  "same nearest, % |", shown, 2),
        ]  # fmt: skip
    parts += [
        "## While training",
        "Zeros can also come little by little, by magnitude on a cubic schedule "
        "(arXiv:1710.01878):",
        GRADUAL,
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="parts to run")
    parser.add_argument("--record", action="store_true", help="write the results and the page")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, run in PARTS.items():
        if re.search(options.only, name):
            results[name] = run()
            results["run"] = harness.run()
            if options.record:
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if options.record:
        PAGE.write_text(page(results))
        if runs := recoveries(results):
            draw(runs)
    print(page(results))


if __name__ == "__main__":
    main()
