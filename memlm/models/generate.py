"""Generating text, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memlm.models.batch import Batch
from memlm.models.decoder import Decoder
from memlm.models.sampling import Sampling


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
    kv: str | None = None,
) -> Iterator[int]:
    """Continues ``ids``, yielding each token as it is made: at most ``max_tokens``, up to and
    without the first of ``stop_ids``, or until the model's positions are full.

    The token is chosen as :class:`Sampling` says; ``seed`` makes sampling repeatable.  ``kv`` is
    what keys and values are stored as: f32, bf16, int8 or int4 (None: as the model computes).

    Raises TypeError for a model that is no decoder, ValueError naming the argument that is out of
    range: at once, not when the first token is asked for.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model: got {type(model).__name__}, expected a Decoder")
    batch = Batch(model, model.new_cache(kv))
    batch.add(ids, max_tokens, Sampling(temperature, top_k, top_p, seed), stop_ids)
    return _tokens(batch)


def _tokens(batch: Batch) -> Iterator[int]:
    while len(batch):
        for _, token in batch.step():
            if token is not None:
                yield token


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
