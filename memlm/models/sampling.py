"""Choosing the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """The likeliest token at ``temperature`` 0, else one drawn from the ``top_k`` likeliest (0:
    all) cut to the fewest that hold ``top_p`` of the probability (nucleus sampling,
    arXiv:1904.09751).  ``seed`` makes draws repeatable; None takes torch's own generator.

    Raises ValueError naming the setting that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature}, finite and at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k: got {self.top_k}, at least 1, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, above 0 and at most 1")

    @property
    def candidates(self) -> int:
        """Among how many of the likeliest tokens the choice is made; 0: all."""
        return self.top_k if self.temperature else 1

    def generator(self) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def choose(
        self, logits: torch.Tensor, ids: torch.Tensor, generator: torch.Generator | None
    ) -> int:
        """One of the candidates' ``ids [n]``, whose ``logits [n]`` descend."""
        if self.temperature == 0:
            return int(ids[0])
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            # Kept: every token before which less than top_p has been collected.
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
