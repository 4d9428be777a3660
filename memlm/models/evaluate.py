"""How good a model is: perplexity, and how far from another: KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memlm.models.decoder import Decoder

WINDOW = 512  # tokens per window; each is scored on its own, without a beginning-of-text token


@dataclass(frozen=True)
class Score:
    """``perplexity`` over ``tokens`` predictions; with a base model, ``kl`` is the mean
    KL(base || model) in nats per token and ``agreement`` the share of equal likeliest tokens."""

    perplexity: float
    tokens: int
    kl: float | None = None
    agreement: float | None = None


def evaluate(
    model: Decoder,
    ids: list[int],
    base: Decoder | None = None,
    window: int = WINDOW,
    progress: Callable[[int, int, str], None] | None = None,
) -> Score:
    """Scores one model: see :func:`evaluate_all`."""
    return evaluate_all({"model": model}, ids, base, window, progress)["model"]


def evaluate_all(
    models: dict[str, Decoder],
    ids: list[int],
    base: Decoder | None = None,
    window: int = WINDOW,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Score]:
    """Scores ``models`` on a text's token ids, cut into windows (a last, shorter one is dropped);
    against ``base``, which may be one of them, where it is given.

    Every token of a window but the first is predicted from those before it.  Sums are f64; the
    memory beyond the models is that of two windows' logits.

    Raises ValueError for a text shorter than one window, a window out of range, or vocabularies
    that differ.
    """
    everyone = [*models.values(), *([base] if base is not None else [])]
    longest = min(m.config.max_positions for m in everyone)
    if not 2 <= window <= longest:
        raise ValueError(f"window: got {window}, accepted is 2 to {longest}")
    if len(ids) < window:
        raise ValueError(f"ids: {len(ids)} tokens are fewer than one window of {window}")
    if len({m.config.vocab_size for m in everyone}) > 1:
        raise ValueError("base: has another vocabulary than the models")
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    sums = {name: [0.0, 0.0, 0] for name in models}  # negative log-likelihood, KL, agreements
    with torch.inference_mode():
        for done, row in enumerate(windows, 1):
            log_q = None if base is None else torch.log_softmax(base(row[None])[0, :-1], dim=-1)
            for name, model in models.items():
                log_p = log_q
                if model is not base:
                    log_p = torch.log_softmax(model(row[None])[0, :-1], dim=-1)
                sums[name][0] -= log_p.gather(1, row[1:, None]).sum(dtype=torch.float64).item()
                if log_q is not None:
                    kl = log_q.exp() * (log_q - log_p)
                    sums[name][1] += kl.sum(dtype=torch.float64).item()
                    sums[name][2] += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
            if progress:
                progress(done, len(windows), "")
    tokens = windows.shape[0] * (window - 1)
    return {
        name: Score(
            math.exp(nll / tokens),
            tokens,
            None if base is None else kl / tokens,
            None if base is None else agree / tokens,
        )
        for name, (nll, kl, agree) in sums.items()
    }
