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
    casts of the module (``.half()``).  ``padding_idx`` is kept for those who read it; it concerns
    gradients only, and there are none."""

    def __init__(
        self,
        packed: Packed,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ):
        super().__init__(packed, dtype)
        self.padding_idx = padding_idx

    @classmethod
    def from_packed(
        cls, packed: Packed, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> Embedding:
        """A layer over an already packed matrix."""
        return cls(packed, dtype, padding_idx)

    @classmethod
    def from_float(cls, embedding: nn.Embedding, format: str | Format) -> Embedding:
        """Quantises a ``torch.nn.Embedding``.

        Raises TypeError for another module, ValueError for one with ``max_norm`` (which rewrites
        its weight), and what :func:`memlm.quantize_weight` raises.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(
                f"embedding: got {type(embedding).__name__}, accepted is torch.nn.Embedding"
            )
        if embedding.max_norm is not None:
            raise ValueError("embedding: max_norm rewrites its weight, which cannot be packed")
        weight = embedding.weight
        return cls(quantize_weight(weight, format), weight.dtype, embedding.padding_idx)

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
        """The ``torch.nn.Embedding`` with the dequantised weights, in f32, bf16 or f16."""
        weight = dequantize(self.packed, dtype)
        made = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=self.padding_idx)
        return made.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.n}, {self.k}{padding}, format={self.format}"
