"""An embedding over packed weights."""

from __future__ import annotations

import torch
from torch import nn

from memlm.formats import Format, Packed
from memlm.layers.packed import PackedModule
from memlm.ops import dequantize, embedding
from memlm.quantize import quantize_weight


class Embedding(PackedModule):
    """Rows of a packed ``W [num_embeddings, embedding_dim]`` by index: takes the place of
    ``torch.nn.Embedding``.  Only the rows asked for are dequantised, to ``dtype``, which follows
    casts of the module (``.half()``)."""

    def __init__(self, packed: Packed, dtype: torch.dtype = torch.float32):
        super().__init__(packed)
        self.dtype = dtype

    @classmethod
    def from_packed(cls, packed: Packed, dtype: torch.dtype = torch.float32) -> Embedding:
        """A layer over an already packed matrix."""
        return cls(packed, dtype)

    @classmethod
    def from_float(cls, embedding: nn.Embedding, format: str | Format) -> Embedding:
        """Quantises a ``torch.nn.Embedding``."""
        return cls(quantize_weight(embedding.weight, format), embedding.weight.dtype)

    @property
    def num_embeddings(self) -> int:
        return self.n

    @property
    def embedding_dim(self) -> int:
        return self.k

    @property
    def op(self) -> str:
        """The operation that forward runs."""
        return "embedding"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids [...]`` int64 (or int32) -> ``[..., embedding_dim]``."""
        if ids.dtype == torch.int32:
            ids = ids.long()
        return embedding(ids, self.packed, self.dtype)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        """The ``torch.nn.Embedding`` with the dequantised weights."""
        return nn.Embedding.from_pretrained(dequantize(self.packed, dtype), freeze=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.n}, {self.k}, format={self.format}"
