"""Structured removal, and recovery of a block-sparse model: docs/recovery.md.

    python -m benchmarks.bench_recover [--only recovery,structured,encoder] [--record]

The parts can run one by one: with --record each keeps its results in
benchmarks/results/recover.json, and the page is written from all that are there.  Calibration and
training see State of the Union addresses, evaluation Moby-Dick.
"""

from __future__ import annotations

import argparse
import copy
import json
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
PRUNING = PruneConfig("sparsegpt", 0.5, "block", samples=SAMPLES, length=WINDOW)
TRAINING = {"steps": 100, "batch": 2, "window": 256, "lr": 3e-4}
EVERY = 20  # steps between evaluations
TOWARDS = {"the dense model": True, "the text alone": False}

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


def recovery() -> dict:
    """SmolLM2 with half of its blocks, and what training makes of it."""
    base, speeches = smollm2(), data.state_of_the_union()
    training = base.tokenizer.encode(speeches)
    ids = base.tokenizer.encode(data.moby_dick())[:TOKENS]
    teacher = memlm.load(data.smollm2_gguf())  # in the file's codes: a fifth of the memory
    pruned = smollm2()
    report = memlm.prune_(pruned, PRUNING, speeches)
    found = {
        "sparsity": report.sparsity,
        "dense": quality(evaluate(base, ids, base)),
        "pruned": say(quality(evaluate(pruned, ids, base))),
        "runs": {},
    }
    for name, distil in TOWARDS.items():
        model, curve, start = copy.deepcopy(pruned), [[0, found["pruned"]]], time.perf_counter()

        def look(done: int, steps: int, loss: str) -> None:
            print(name, done, loss, file=sys.stderr, flush=True)
            if done % EVERY == 0:
                curve.append([done, say(quality(evaluate(model, ids, base)))])

        losses = recover_(model, training, teacher if distil else None, progress=look, **TRAINING)
        packed = memlm.sparsify_(model, "block/int4", strict=True)
        found["runs"][name] = {
            "curve": curve,
            "losses": losses,
            "seconds": time.perf_counter() - start,
            "int4": say(quality(evaluate(packed, ids, base))),
        }
    return found


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


PARTS = {"recovery": recovery, "structured": structured, "encoder": encoder}


def draw(found: dict) -> None:
    """Divergence and perplexity over the steps."""
    if not (plt := plots._pyplot()):
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, label in (
        (axes[0], "kl", "KL(dense || model), nats per token"),
        (axes[1], "perplexity", "perplexity"),
    ):
        for (name, run), style in zip(found["runs"].items(), ("o-", "s--")):
            steps, scores = zip(*run["curve"])
            axis.plot(steps, [score[key] for score in scores], style, label=f"towards {name}")
        if key == "perplexity":
            axis.axhline(found["dense"][key], color="black", linewidth=1, label="dense")
        axis.set(xlabel="optimizer steps", ylabel=label, yscale="log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axis.grid(which="both", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=9, frameon=False)
    figure.suptitle("SmolLM2-135M with half of its 16x32 blocks, on Moby-Dick", x=0.01, ha="left")
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
memlm.sparsify_(model, "block/int4")
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
memlm.sparsify_(model, "block/int4")
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
    if found := results.get("recovery"):
        config, settings = PRUNING, TRAINING
        rows = [["dense", "", *cells(found["dense"])], ["pruned", "0", *cells(found["pruned"])]]
        for name, one in found["runs"].items():
            for step, score in one["curve"][1:]:
                rows.append([f"towards {name}", str(step), *cells(score)])
            rows.append([f"towards {name}, then block/int4", str(step), *cells(one["int4"])])
        tokens = settings["batch"] * settings["window"]
        parts += [
            "## Recovery",
            f"SmolLM2-135M, {config.method} with {config.sparsity:.0%} of the blocks of "
            f"{config.block[0]}x{config.block[1]} weights taken out ({config.samples} pieces of "
            f"{config.length} tokens), then `memlm.prune.recover_`: {settings['steps']} steps of "
            f"AdamW on {tokens} tokens each, learning rate {settings['lr']:g}; what was taken out "
            "stays out. Towards the dense model: the divergence from its probabilities "
            "(arXiv:1503.02531); towards the text alone: cross entropy. The dense model is loaded "
            "in the codes of its file.",
            RECOVER,
            f"![KL and perplexity over the steps]({PICTURE.name})",
            table("| | steps | perplexity | KL, nats | same top, % |", rows),
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
            f"(arXiv:2302.04089), from {SAMPLES} pieces of {WINDOW} tokens; nothing was trained. "
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
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--record", action="store_true", help="write the results and the page")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["run"] = harness.run()
    for name in filter(None, options.only.split(",")):
        results[name] = PARTS[name]()
        if options.record:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if options.record:
        PAGE.write_text(page(results))
        if "recovery" in results:
            draw(results["recovery"])
    print(page(results))


if __name__ == "__main__":
    main()
