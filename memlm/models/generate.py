"""Generating text, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from memlm.models.decoder import Decoder


def choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> int:
    """One token from ``logits [vocab]``: the likeliest at temperature 0, else drawn from the
    ``top_k`` likeliest (0: all) cut to the fewest that hold ``top_p`` of the probability (nucleus
    sampling, arXiv:1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = torch.topk(logits, min(top_k, logits.numel()) if top_k else logits.numel())
    probabilities = torch.softmax(values / temperature, dim=-1)
    if top_p < 1:
        # Kept: every token before which less than top_p has been collected.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def generate(
    model: Decoder,
    ids: list[int],
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Continues ``ids``, yielding each token as it is made: at most ``max_tokens``, up to and
    without the first of ``stop_ids``, or until the model's positions are full.

    ``temperature`` 0 is greedy; ``seed`` makes sampling repeatable.

    Raises TypeError for a model that is no decoder, ValueError naming the argument that is out of
    range: at once, not when the first token is asked for.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model: got {type(model).__name__}, expected a Decoder")
    ids = list(ids)
    if not ids:
        raise ValueError("ids: the prompt is empty")
    if not all(0 <= i < model.config.vocab_size for i in ids):
        raise ValueError(f"ids: accepted are 0 to {model.config.vocab_size - 1}")
    if len(ids) > model.config.max_positions:
        raise ValueError(f"ids: {len(ids)} tokens, the model takes {model.config.max_positions}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, finite and at least 0")
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, at least 1, or 0 for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, above 0 and at most 1")
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    return _generate(model, ids, max_tokens, temperature, top_k, top_p, set(stop_ids), generator)


def _generate(model, ids, max_tokens, temperature, top_k, top_p, stop_ids, generator):
    cache = model.new_cache()
    device = model.norm.weight.device
    step = torch.tensor([ids], device=device)
    for _ in range(max_tokens):
        if cache.length + step.shape[1] > model.config.max_positions:
            return
        with torch.inference_mode():  # not across the yield: it would hold in the caller
            logits = model(step, cache, last_only=True)[0, -1].cpu()
            token = choose(logits, temperature, top_k, top_p, generator)
        if token in stop_ids:
            return
        yield token
        step = torch.tensor([[token]], device=device)


class TextStream:
    """Token ids in, text out, as soon as it is certain: never part of a character.

    A tokenizer may spread a character's bytes over several tokens, and its decoder may treat the
    first token of a text in its own way (dropping a space).  So each step decodes from the last
    piece given out, and gives out what is new behind it, unless it ends in a replacement character
    that further bytes may still complete.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last piece given out, and what came since
        self._given = 0  # how many of them have been given out

    def _new(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return new

    def finish(self) -> str:
        """What is left when no more tokens come."""
        new = self._new()
        self._given = len(self._ids)
        return new
