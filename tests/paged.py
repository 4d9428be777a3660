"""Paged caches for tests: some sequences, their tables shuffled, all else NaN."""

from dataclasses import dataclass

import torch

from memlm.kv_formats import KvFormat
from memlm.ops._registry import implementations


@dataclass
class Paged:
    format: KvFormat
    pool: torch.Tensor
    tables: torch.Tensor
    lengths: list[int]
    k: list[torch.Tensor]  # of each sequence [length, kv_heads, dim]
    v: list[torch.Tensor]

    def step(self, new: list[int]):
        """rows, lengths, tables of a step with so many last tokens of each sequence."""
        rows = torch.tensor([0, *new]).cumsum(0)
        return rows, torch.tensor(self.lengths, dtype=torch.int64), self.tables

    def kind(self) -> tuple[int, int]:
        """type and block_tokens, as the ops take them."""
        return self.format.index, self.format.tokens


def tables_for(lengths: list[int], tokens: int, seed: int) -> tuple[torch.Tensor, int]:
    """Block tables, -1 beyond each sequence, over a pool of this many blocks, some of them unused."""
    counts = [-(-length // tokens) for length in lengths]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((len(lengths), max([*counts, 1])), -1, dtype=torch.int32)
    for row, count in zip(tables, counts):
        row[:count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    return tables, total


def paged(
    type: str,
    dim: int,
    lengths: list[int],
    kv_heads: int = 2,
    tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    implementation: str = "cpp",
) -> Paged:
    """Sequences of normal keys and values; each head of keys has one channel 8 times as large."""
    format = KvFormat(type, tokens, dim)
    tables, blocks = tables_for(lengths, tokens, seed)
    pool = torch.full((kv_heads, blocks, format.block_bytes), 255, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    k, v = torch.randn(2, total, kv_heads, dim, generator=generator)
    k[..., 0] *= 8
    k, v = k.to(dtype), v.to(dtype)
    made = Paged(format, pool, tables, lengths, k.split(lengths), v.split(lengths))
    if lengths:
        append = implementations("kv_append")[implementation]
        append(pool, k, v, *made.step(lengths), *made.kind())
    return made
