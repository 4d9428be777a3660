"""The text that weights are judged on, and its way through a model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from memlm.models.decoder import Decoder
from memlm.models.encoder import Encoder
from memlm.prune.families import Family, Reached, Run
from memlm.prune.gram import Gram

TOKENS = 1024  # in a batch: what bounds the memory of activations inside a layer
WORDS = 0.7  # of English, in a token
CHARACTERS = 1 << 15  # tokenised at a time


def batches_of(model: nn.Module, calibration, samples: int, length: int) -> list:
    """Batches as :class:`memlm.prune.families.Family` runs them.

    calibration: token ids ``[batch, length]`` (of an encoder ``(ids, mask)``), or several of these,
        of transformers' models also dicts of arguments; or text, of a model with a tokenizer: of a
        one string, of which up to ``samples`` pieces of ``length`` tokens (of an encoder, about so
        many) are taken, evenly spread; or strings, of which an encoder takes up to ``samples``, cut
        to ``length`` tokens.

    Raises ValueError where nothing is given, or text for a model without tokenizer.
    """
    if isinstance(calibration, str):
        texts = [calibration]
    elif isinstance(calibration, (torch.Tensor, tuple, Mapping)):
        return list(_split(calibration))
    else:
        given = [] if calibration is None else list(calibration)
        texts = given if given and all(isinstance(item, str) for item in given) else None
        if texts is None:
            batches = [part for batch in given for part in _split(batch)]
            if not batches:
                raise ValueError("calibration: none given")
            return batches
    tokenizer = getattr(model, "tokenizer", None)
    if not isinstance(model, (Decoder, Encoder)) or tokenizer is None:
        raise ValueError("calibration: got text, but the model has no tokenizer: give token ids")
    length = min(length, model.config.max_positions)
    if isinstance(model, Encoder):
        return _of_texts(tokenizer, texts, samples, length)
    return _windows(_encode(tokenizer, "\n".join(texts)), samples, length)


def _split(batch) -> Iterator:
    """A batch in parts of no more than TOKENS tokens, or one row."""
    if isinstance(batch, torch.Tensor):
        yield from batch.split(max(1, TOKENS // max(1, batch.shape[-1])))
    elif isinstance(batch, tuple):
        yield from zip(*(list(_split(part)) for part in batch))
    else:
        yield batch


def _spread(count: int, samples: int) -> list[int]:
    """Up to ``samples`` of ``0 .. count - 1``, evenly spread."""
    samples = min(count, samples)
    return [i * count // samples for i in range(samples)]


def _encode(tokenizer, text: str) -> torch.Tensor:
    """A tokenizer takes far more memory than its text: it is given parts, cut between words."""
    parts, start = [], 0
    while start < len(text):
        end = start + CHARACTERS
        if end < len(text):
            space = max(text.rfind(mark, start + 1, end) for mark in " \n")
            end = space if space > 0 else end
        parts.append(torch.tensor(tokenizer.encode(text[start:end])))
        start = end
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _windows(ids: torch.Tensor, samples: int, length: int) -> list[torch.Tensor]:
    if len(ids) < length:
        raise ValueError(f"calibration: {len(ids)} tokens are fewer than one piece of {length}")
    pieces = ids[: len(ids) // length * length].view(-1, length)
    return list(_split(pieces[_spread(len(pieces), samples)]))


def _of_texts(tokenizer, texts: list[str], samples: int, length: int) -> list:
    if len(texts) == 1:
        words, size = texts[0].split(), max(1, int(WORDS * length))
        texts = [" ".join(words[i : i + size]) for i in range(0, len(words), size)]
    texts = [texts[i] for i in _spread(len(texts), samples)]
    if not texts:
        raise ValueError("calibration: the text is empty")
    rows = tokenizer.encode_batch(texts)
    # The last token, a special one, stays.
    rows = [row if len(row) <= length else row[: length - 1] + row[-1:] for row in rows]
    rows.sort(key=len)
    batches, start = [], 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and len(rows[end]) * (end + 1 - start) <= TOKENS:
            end += 1
        tokens = [torch.tensor(row) for row in rows[start:end]]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        lengths = torch.tensor([len(row) for row in tokens])[:, None]
        batches.append((ids, torch.arange(ids.shape[1]) < lengths))
        start = end
    return batches


class Walk:
    """A calibration between two layers of a model: held are the hidden states of all batches there,
    nothing else."""

    def __init__(self, family: Family, batches: Iterable):
        self.runs = [Run(family, batch) for batch in batches]
        # memlm's own models compute in f32, whatever their weights and these states are stored in.
        self._in_f32 = isinstance(family.model, (Decoder, Encoder))

    def grams(
        self, i: int, linears: Mapping[str, nn.Linear], advance: bool = False
    ) -> list[tuple[list[str], Gram]]:
        """What the linear layers inside layer ``i`` are given: the names of those that share their
        input, and its products.  With ``advance`` the states are then those behind the layer.

        Raises ValueError naming a linear layer that the layer does not call, or whose input has NaN
        or Inf.
        """
        groups: list[tuple[list[str], Gram]] = []
        last, run, stop_at = None, None, None

        def seen(name: str, x: torch.Tensor) -> None:
            nonlocal last
            if x is last:  # nothing new, but in the first batch that they share it
                if stop_at is None:
                    groups[-1][0].append(name)
                return
            last = x
            if stop_at is None and run is self.runs[0]:
                groups.append(([name], Gram(x.shape[-1])))
            gram = next(gram for names, gram in groups if name in names)
            gram.add(run.tokens(x))
            if name == stop_at:
                raise Reached

        with _watching(linears, seen):
            for run in self.runs:
                try:
                    states = self._through(run, i)
                    if advance:
                        run.states = states
                except Reached:
                    pass
                last = None
                if not advance and groups:
                    stop_at = groups[-1][0][0]
        found = {name for names, _ in groups for name in names}
        for name in linears:
            if name not in found:
                raise ValueError(f"{name}: its layer does not call it: it cannot be judged")
        for names, gram in groups:
            if not torch.isfinite(gram.sums).all() or not torch.isfinite(gram.squares).all():
                raise ValueError(f"{names[0]}: its input from the calibration has NaN or Inf")
        return groups

    def advance(self, i: int) -> None:
        """Takes the states through layer ``i``."""
        for run in self.runs:
            run.states = self._through(run, i)

    def _through(self, run: Run, i: int) -> torch.Tensor:
        states = run.states.float() if self._in_f32 else run.states
        return run.calls[i](states).to(run.states.dtype)


@contextmanager
def _watching(linears: Mapping[str, nn.Linear], seen: Callable[[str, torch.Tensor], None]):
    """``seen(name, x)`` for every call of these layers."""

    def hook(name: str):
        return lambda _, args: seen(name, args[0])

    hooks = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def in_f32(layer: nn.Module):
    """The layer's float parameters in f32; then what is new in the types that they had, the others
    as they were."""
    before = [(p, p.data) for p in layer.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    wide = {}
    for parameter, data in before:
        parameter.data = wide[parameter] = data.float()
    try:
        yield
    finally:
        for parameter, data in before:
            unchanged = parameter.data.data_ptr() == wide[parameter].data_ptr()
            parameter.data = data if unchanged else parameter.data.to(data.dtype)
