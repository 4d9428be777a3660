"""How good a model is: perplexity, and how far from another: KL divergence."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memlm.kv_cache import PagedKVCache
from memlm.models.decoder import Decoder

WINDOW = 512  # tokens per window; each is scored on its own, without a beginning-of-text token
LARGEST = math.log(sys.float_info.max)
BLOCK = 64  # positions whose probabilities are held at once: 12 MB for a vocabulary of 49,152


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
    kv: str | None = None,
) -> Score:
    """Scores one model: see :func:`evaluate_all`."""
    return evaluate_all({"model": model}, ids, base, window, progress, kv)["model"]


def evaluate_all(
    models: dict[str, Decoder],
    ids: list[int],
    base: Decoder | None = None,
    window: int = WINDOW,
    progress: Callable[[int, int, str], None] | None = None,
    kv: str | None = None,
) -> dict[str, Score]:
    """Scores ``models`` on a text's token ids, cut into windows (a last, shorter one is dropped);
    against ``base``, which may be one of them, where it is given.

    Every token of a window but the first is predicted from those before it.  With ``kv`` the
    models, but not the base, see the keys and values before it as a cache of that type holds them
    (:meth:`Decoder.new_cache`).  Sums are f64; the memory beyond the models is that of two windows'
    logits.

    Raises TypeError for a model that is no decoder, ValueError for no models, a text shorter than
    one window, a window out of range, vocabularies that differ, or another kv.
    """
    everyone = [*models.values(), *([base] if base is not None else [])]
    if not models:
        raise ValueError("models: none given")
    for model in everyone:
        if not isinstance(model, Decoder):
            raise TypeError(f"models: got {type(model).__name__}, perplexity is for decoders")
    longest = min(m.config.max_positions for m in everyone)
    if not 2 <= window <= longest:
        raise ValueError(f"window: got {window}, accepted is 2 to {longest}")
    if len(ids) < window:
        raise ValueError(f"ids: {len(ids)} tokens are fewer than one window of {window}")
    if len({m.config.vocab_size for m in everyone}) > 1:
        raise ValueError("base: has another vocabulary than the models")
    windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    caches = {name: None if kv is None else model.new_cache(kv) for name, model in models.items()}
    with torch.inference_mode():
        for done, row in enumerate(windows, 1):
            base_logits = None if base is None else base(row[None])[0, :-1]
            for name, model in models.items():
                same = model is base and kv is None
                logits = base_logits if same else _logits(model, row, caches[name])
                sums[name] += _sums(logits, row[1:], base_logits)
                del logits
            if progress:
                progress(done, len(windows), "")
    tokens = windows.shape[0] * (window - 1)
    scores = {}
    for name, (nll, kl, agree) in ((name, (s / tokens).tolist()) for name, s in sums.items()):
        against = (None, None) if base is None else (kl, agree)
        perplexity = math.inf if nll > LARGEST else math.exp(nll)
        scores[name] = Score(perplexity, tokens, *against)
    return scores


def _logits(model: Decoder, row: torch.Tensor, cache: PagedKVCache | None) -> torch.Tensor:
    """``[n - 1, vocab]`` for the tokens of a window ``[n]``; the cache is empty before and
    after."""
    logits = model(row[None], cache)[0, :-1]
    for sequence in cache.sequences if cache is not None else ():
        cache.free(sequence)
    return logits


def _sums(
    logits: torch.Tensor, targets: torch.Tensor, base_logits: torch.Tensor | None
) -> torch.Tensor:
    """``logits [n, vocab]``, ``targets [n]`` -> f64 sums over n of the negative log-likelihood,
    of KL(base || model) and of equal likeliest tokens (0 without a base)."""
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(targets), BLOCK):
        rows = slice(start, start + BLOCK)
        log_p = torch.log_softmax(logits[rows], dim=-1)
        total[0] -= log_p.gather(1, targets[rows, None]).sum(dtype=torch.float64)
        if base_logits is not None:
            log_q = torch.log_softmax(base_logits[rows], dim=-1)
            total[1] += (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64)
            total[2] += (log_q.argmax(-1) == log_p.argmax(-1)).sum()
    return total
