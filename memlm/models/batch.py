"""Decoding several sequences at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from memlm.errors import OutOfBlocks
from memlm.kv_cache import PagedKVCache
from memlm.models.decoder import Decoder
from memlm.models.sampling import Sampling


@dataclass(eq=False)
class _Sequence:
    handle: int
    pending: list[int]  # tokens that the cache does not hold yet
    left: int  # tokens to make
    most: int  # tokens that the cache will hold
    sampling: Sampling
    stop_ids: frozenset[int]
    generator: torch.Generator | None
    place: int | None = None  # in the cache; None: it waits


class Batch:
    """Sequences of unequal lengths, decoded together from one cache.  They join and leave between
    steps (continuous batching: Orca, OSDI 2022): each step takes every sequence one token further,
    and up to ``chunk`` tokens of new prompts through the layers.

    A sequence whose prompt begins like that of another one under way shares its blocks.  Where the
    ``cache`` has a limited number of blocks, a sequence waits until those that it may need are
    free.  Raises TypeError for a model that is no decoder.
    """

    def __init__(
        self, model: Decoder, cache: PagedKVCache | None = None, chunk: int = Decoder.CHUNK
    ):
        if not isinstance(model, Decoder):
            raise TypeError(f"model: got {type(model).__name__}, expected a Decoder")
        if chunk < 1:
            raise ValueError(f"chunk: got {chunk}, at least 1")
        self.model, self.chunk = model, chunk
        self.cache = model.new_cache() if cache is None else cache
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._next = 0

    def __len__(self) -> int:
        """How many sequences are under way or wait."""
        return len(self._waiting) + len(self._running)

    def add(
        self,
        ids: Iterable[int],
        max_tokens: int = 128,
        sampling: Sampling = Sampling(),
        stop_ids: Iterable[int] = (),
    ) -> int:
        """A sequence that continues ``ids``: at most ``max_tokens`` tokens, up to and without the
        first of ``stop_ids``, or until the model's positions are full.  Returns its handle.

        Raises ValueError naming the argument that is out of range, OutOfBlocks where the cache
        could never hold it.
        """
        ids, config = list(ids), self.model.config
        if not ids:
            raise ValueError("ids: the prompt is empty")
        if not all(0 <= i < config.vocab_size for i in ids):
            raise ValueError(f"ids: accepted are 0 to {config.vocab_size - 1}")
        if len(ids) > config.max_positions:
            raise ValueError(f"ids: {len(ids)} tokens, the model takes {config.max_positions}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, at least 1")
        # The last token needs no position: nothing is computed after it.
        left = min(max_tokens, config.max_positions - len(ids) + 1)
        most = len(ids) + left - 1
        sequence = _Sequence(
            self._next, ids, left, most, sampling, frozenset(stop_ids), sampling.generator()
        )
        needed = self._most_blocks(sequence)
        if self.cache.fixed and needed > self.cache.count:
            raise OutOfBlocks(f"ids: {needed} blocks are needed, the cache has {self.cache.count}")
        self._waiting.append(sequence)
        self._next += 1
        return sequence.handle

    def remove(self, handle: int) -> None:
        """Ends a sequence, if it is there still."""
        for sequence in [*self._running, *self._waiting]:
            if sequence.handle == handle:
                self._end(sequence)

    def _end(self, sequence: _Sequence) -> None:
        if sequence.place is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self.cache.free(sequence.place)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int | None]]:
        """What the step made: ``(handle, token)``; and ``(handle, None)``, once, of a sequence that
        has ended.  A prompt of many tokens takes several steps to its first token.

        Without sequences: [].
        """
        counts = self._next_counts()
        if not counts:
            return []
        rows = [token for sequence, n in counts.items() for token in sequence.pending[:n]]
        step = self.cache.begin_step({sequence.place: n for sequence, n in counts.items()})
        x = self.model.run(torch.tensor(rows, device=self.cache.device), self.cache, step)
        self.cache.commit(
            step, {sequence.place: sequence.pending[:n] for sequence, n in counts.items()}
        )
        ready, last, end = [], [], 0
        for sequence, n in counts.items():
            end += n
            del sequence.pending[:n]
            if not sequence.pending:
                ready.append(sequence)
                last.append(end - 1)
        if not ready:
            return []
        made = []
        chosen = self._choose(ready, x if len(last) == len(x) else x[last])
        for sequence, token in zip(ready, chosen):
            stopped = token in sequence.stop_ids
            if not stopped:
                made.append((sequence.handle, token))
                sequence.pending.append(token)
                sequence.left -= 1
            if stopped or not sequence.left:
                made.append((sequence.handle, None))
                self._end(sequence)
        return made

    def _next_counts(self) -> dict[_Sequence, int]:
        """How many tokens of each sequence the next step takes."""
        room = self.chunk
        counts = {}
        for sequence in self._running:
            count = len(sequence.pending)
            if count > 1:
                count = min(count, room)
                room -= count
            if count:
                counts[sequence] = count
        while room and self._waiting and self._join(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            counts[sequence] = min(room, len(sequence.pending))
            room -= counts[sequence]
        return counts

    def _join(self, sequence: _Sequence) -> bool:
        """Gives it a place in the cache, if all that it may need is free."""
        cache = self.cache
        if cache.fixed:
            held = sum(map(self._most_blocks, self._running))
            if held + self._most_blocks(sequence) > cache.count:
                return False
        sequence.place = cache.add(sequence.pending)
        del sequence.pending[: cache.length(sequence.place)]
        return True

    def _most_blocks(self, sequence: _Sequence) -> int:
        """The blocks of a sequence when it ends."""
        return -(-sequence.most // self.cache.format.tokens)

    def _choose(self, sequences: list[_Sequence], x: torch.Tensor) -> list[int]:
        """The next token of each, from the row of ``x [n, hidden]``."""
        most = [sequence.sampling.candidates for sequence in sequences]
        vocab = self.model.config.vocab_size
        k = min(max(most), vocab) if all(most) else vocab
        if k < vocab:
            logits, ids = (t.cpu() for t in self.model.top(x, k))
        else:
            logits, ids = self.model.logits(x).cpu().sort(dim=-1, descending=True, stable=True)
        if all(n == 1 for n in most):
            return ids[:, 0].tolist()
        return [
            s.sampling.choose(values[: n or None], candidates[: n or None], s.generator)
            for s, n, values, candidates in zip(sequences, most, logits, ids)
        ]
