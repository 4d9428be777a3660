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
    """Scores ``model`` on a text's token ids, cut into windows (a last, shorter one is dropped).

    Every token of a window but the first is predicted from those before it.  Sums are f64; the
    memory beyond the models is that of one window's logits.

    Raises ValueError for a text shorter than one window, or a window out of range.
    """
    if not 2 <= window <= model.config.max_positions:
        raise ValueError(f"window: got {window}, accepted is 2 to {model.config.max_positions}")
    if len(ids) < window:
        raise ValueError(f"ids: {len(ids)} tokens are fewer than one window of {window}")
    if base is not None and base.config.vocab_size != model.config.vocab_size:
        raise ValueError("base: has another vocabulary than model")
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    nll = kl = agree = 0.0
    with torch.inference_mode():
        for done, row in enumerate(windows, 1):
            log_p = torch.log_softmax(model(row[None])[0, :-1], dim=-1)
            nll -= log_p.gather(1, row[1:, None]).sum(dtype=torch.float64).item()
            if base is not None:
                log_q = torch.log_softmax(base(row[None])[0, :-1], dim=-1)
                kl += (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64).item()
                agree += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
            if progress:
                progress(done, len(windows), "")
    tokens = windows.shape[0] * (window - 1)
    if base is None:
        return Score(math.exp(nll / tokens), tokens)
    return Score(math.exp(nll / tokens), tokens, kl / tokens, agree / tokens)
