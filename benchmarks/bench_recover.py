"""Structured removal, and recovery of a block-sparse model: docs/recovery.md.

    python -m benchmarks.bench_recover [--only structured,encoder,recovery] [--steps 120] [--record]

The parts can run one by one: each keeps its results in benchmarks/results/recover.json, and the page is
written from all that are there.  Calibration and training see State of the Union addresses,
evaluation Moby-Dick.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import memlm
from benchmarks import harness, plots
from memlm import data
from memlm.models.evaluate import WINDOW, evaluate
from memlm.prune import PruneConfig, recover_, remove_

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "recovery.md", ROOT / "benchmarks" / "results" / "recover.json"
PICTURE = ROOT / "docs" / "recovery.png"
CALIBRATION, EVALUATION = 32, 16  # windows of WINDOW tokens
SENTENCES = 256
STEPS, BATCH, LENGTH, RATE = 120, 4, 256, 3e-4
SPARSITY, EVERY = 0.5, 20  # steps between evaluations, of a quarter of the windows

DECODER = {
    "2 of 30 layers": {"layers": 2},
    "4 of 30 layers": {"layers": 4},
    "6 of 30 layers": {"layers": 6},
    "10 % of channels": {"channels": 0.1},
    "25 % of channels": {"channels": 0.25},
    "1 of 3 key-value heads": {"heads": 1},
}
ENCODER = {
    "10 % of channels": {"channels": 0.1},
    "25 % of channels": {"channels": 0.25},
    "2 of 12 heads": {"heads": 2},
    "4 of 12 heads": {"heads": 4},
    "1 of 6 layers": {"layers": 1},
}


def smollm2() -> memlm.models.decoder.Decoder:
    return memlm.load(data.smollm2_gguf(), torch.float32, dequantize=True)


def windows(ids: list[int], count: int) -> list[torch.Tensor]:
    """``count`` windows ``[1, WINDOW]``, spread over the text."""
    starts = torch.linspace(0, len(ids) - WINDOW, count).long().tolist()
    return [torch.tensor([ids[start : start + WINDOW]]) for start in starts]


def structured() -> list[dict]:
    """SmolLM2 without parts, with and without the others' update."""
    base = smollm2()
    calibration = windows(base.tokenizer.encode(data.state_of_the_union()), CALIBRATION)
    ids = base.tokenizer.encode(data.moby_dick())[: EVALUATION * WINDOW]
    score = evaluate(base, ids)
    rows = [{"removed": "nothing", "parameters": 1.0, "perplexity": score.perplexity}]
    for name, sizes in DECODER.items():
        for compensate in (False, True) if "layers" not in sizes else (None,):
            model, start = smollm2(), time.perf_counter()
            update = {} if compensate is None else {"compensate": compensate}
            removal = remove_(model, calibration, **sizes, **update)
            seconds = time.perf_counter() - start
            score = evaluate(model, ids, base)
            rows.append(
                {
                    "removed": name,
                    "update": compensate,
                    "layers": removal.layers,
                    "parameters": removal.parameters / removal.before,
                    "perplexity": score.perplexity,
                    "kl": score.kl,
                    "agreement": score.agreement,
                    "seconds": seconds,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def sentences(text: str, count: int) -> list[str]:
    found = [s.strip() for s in text.split(". ") if 40 < len(s) < 300]
    return found[:: len(found) // count][:count]


def encoder() -> list[dict]:
    """MiniLM without parts: how far embeddings move."""
    base = memlm.load(data.minilm())
    texts = sentences(data.moby_dick(), SENTENCES)
    calibration = [
        (torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
        for row in base.tokenizer.encode_batch(sentences(data.state_of_the_union(), 4 * SENTENCES))
    ]
    exact, rows = base.embed(texts), []
    for name, sizes in ENCODER.items():
        for compensate in (False, True) if "layers" not in sizes else (None,):
            model = memlm.load(data.minilm())
            update = {} if compensate is None else {"compensate": compensate}
            removal = remove_(model, calibration, **sizes, **update)
            vectors = model.embed(texts)
            cosine = (vectors * exact).sum(-1)
            nearest = [(v @ v.T).fill_diagonal_(-1).argmax(-1) for v in (vectors, exact)]
            rows.append(
                {
                    "removed": name,
                    "update": compensate,
                    "parameters": removal.parameters / removal.before,
                    "cosine": cosine.mean().item(),
                    "least": cosine.min().item(),
                    "nearest": (nearest[0] == nearest[1]).float().mean().item(),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows
