"""Paged caches for tests: some sequences, their tables shuffled, all else NaN."""

from dataclasses import dataclass

import torch

from memlm import kv_formats
from memlm.kv_formats import KvFormat
from memlm.ops._registry import implementations


@dataclass
class Paged:
    format: KvFormat
    pool: torch.Tensor
    tails: torch.Tensor | None
    tables: torch.Tensor
    tail_of: torch.Tensor | None
    lengths: list[int]
    k: list[torch.Tensor]  # of each sequence [length, kv_heads, dim]
    v: list[torch.Tensor]

    def step(self, new: list[int]):
        """From rows to block_tokens, as the ops take them: of a step with so many last tokens of each
        sequence."""
        rows = torch.tensor([0, *new]).cumsum(0)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return rows, lengths, self.tables, self.tail_of, self.format.index, self.format.tokens

    def part(self, i: int, length: int):
        """Sequence i alone, of so many tokens."""
        tail_of = None if self.tail_of is None else self.tail_of[i : i + 1]
        return Paged(
            self.format, self.pool, self.tails, self.tables[i : i + 1], tail_of, [length], [], []
        )


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
    tails = tail_of = None
    if format.tail:
        shape = (kv_heads, len(lengths) + 1, format.tail.block_bytes)
        tails = torch.full(shape, 255, dtype=torch.uint8)
        tail_of = torch.arange(len(lengths), 0, -1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    k, v = torch.randn(2, total, kv_heads, dim, generator=generator)
    k[..., 0] *= 8
    k, v = k.to(dtype), v.to(dtype)
    made = Paged(format, pool, tails, tables, tail_of, lengths, k.split(lengths), v.split(lengths))
    if lengths:
        append = implementations("kv_append")[implementation]
        append(pool, tails, k, v, *made.step(lengths))
    return made


def check_extremes(append, type: str, dtype: torch.dtype = torch.float32) -> None:
    """What is not finite, zeros, and numbers beyond f16's range, stored by ``append`` as the op."""
    made = paged(type, 32, [5], kv_heads=1, tokens=32)
    k, v = torch.ones(2, 5, 1, 32)
    k[0, 0, 3], k[1, 0, 3], k[2], k[3] = torch.nan, torch.inf, 0, 1e-30
    v[2] = 1e30
    append(made.pool, made.tails, k.to(dtype), v.to(dtype), *made.step([5]))
    keys, values = kv_formats.read(made.format, made.pool[0, made.tables[0, 0]])
    assert not keys[:2].isfinite().any() and not keys[2:4].any() and not values[2].isfinite().any()
    torch.testing.assert_close(keys[4], torch.ones(32), rtol=2**-10, atol=2**-10)
    torch.testing.assert_close(values[[0, 1, 3, 4]], torch.ones(4, 32), rtol=2**-10, atol=2**-10)
