"""What a linear layer's inputs were like: the products of its columns, summed over tokens."""

from __future__ import annotations

import torch
from torch import nn

CHUNK = 192  # columns multiplied at a time: of the products only a triangle of such chunks


class Gram:
    """Sums over tokens, in f64, of what a layer is given: of the products of its columns, and of
    the columns themselves."""

    def __init__(self, columns: int):
        self._lower = torch.zeros(columns, columns, dtype=torch.float64)
        self.sums = torch.zeros(columns, dtype=torch.float64)
        self.tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        """f32 ``[tokens, columns]``: products are summed in f32 over these, in f64 beyond."""
        for start in range(0, rows.shape[1], CHUNK):
            end = start + CHUNK
            self._lower[start:end, :end] += rows[:, start:end].T @ rows[:, :end]
        self.sums += rows.sum(0, dtype=torch.float64)
        self.tokens += len(rows)

    @property
    def products(self) -> torch.Tensor:
        """``X^T X``, f64 ``[columns, columns]``, exactly symmetric; not a copy."""
        sums = self._lower
        for start in range(0, len(sums), CHUNK):
            chunk = slice(start, start + CHUNK)
            sums[:start, chunk] = sums[chunk, :start].T
            square = sums[chunk, chunk]
            square.copy_(square.tril() + square.tril(-1).T)
        return sums

    @property
    def squares(self) -> torch.Tensor:
        """The squared norms of the columns, f64 ``[columns]``."""
        return self._lower.diagonal()

    def of(self, linear: nn.Linear) -> torch.Tensor:
        """The Gram matrix; about the mean where the layer has a bias, which absorbs it."""
        if linear.bias is None:
            return self.products
        return self.products - self.sums[:, None] * self.sums / self.tokens
