"""Layers that compute several projections of one input in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from memlm._format import SparseFormat, parse_format
from memlm.formats import TILE_ROWS, Format
from memlm.layers.linear import Linear, linear_weight
from memlm.layers.sparse import SparseLinear


def _stacked(
    layers: Sequence[nn.Module], rows: int, format: str | Format | SparseFormat, mode: str | None
) -> Linear:
    """One packed layer of the rows of ``layers``, each padded to a multiple of ``rows``."""
    weights = [linear_weight(layer) for layer in layers]
    widths = sorted({w.shape[1] for w in weights})
    if len(widths) != 1:
        raise ValueError(f"layers: got in_features {widths}, expected the same of all")

    def padded(t: torch.Tensor) -> torch.Tensor:
        return F.pad(t.detach(), (0, 0) * (t.dim() - 1) + (0, -len(t) % rows))

    whole = nn.Linear(widths[0], 1, bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([padded(w) for w in weights]))
    if any(layer.bias is not None for layer in layers):
        biases = [w.new_zeros(len(w)) if x.bias is None else x.bias for w, x in zip(weights, layers)]
        whole.bias = nn.Parameter(torch.cat([padded(bias) for bias in biases]))
    kind = SparseLinear if isinstance(parse_format(format), SparseFormat) else Linear
    return kind.from_float(whole, format, mode)


class Stacked(nn.Module):
    """Layers of one input whose results stand side by side, where they cannot be one layer: their
    formats differ, say.  ``x [..., k]`` -> ``[..., n_1 + n_2 + ...]``."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def out_features(self) -> int:
        return sum(layer.out_features for layer in self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


class Projections(nn.Module):
    """Several linear layers of one input, such as query, key and value: ``x [..., k]`` ->
    a tuple of ``[..., n_i]``, computed in one call over weights that stand one below the other.
    The results are views of one tensor.

    ``linear`` is the packed :class:`Linear` of all rows, ``sizes`` the n_i.
    """

    def __init__(self, linear: Linear, sizes: Sequence[int]):
        super().__init__()
        if sum(sizes) != linear.out_features:
            raise ValueError(f"sizes: got {list(sizes)}, the layer has {linear.out_features} rows")
        self.linear, self.sizes = linear, list(sizes)

    @classmethod
    def from_float(
        cls, layers: Sequence[nn.Module], format: str | Format | SparseFormat, mode: str | None = None
    ) -> Projections:
        """Quantises ``torch.nn.Linear`` layers (or Hugging Face's Conv1D) of one input.  Raises
        ValueError for layers of different inputs, and what :meth:`Linear.from_float` raises."""
        if not layers:
            raise ValueError("layers: got none, at least one is needed")
        return cls(_stacked(layers, 1, format, mode), [len(linear_weight(x)) for x in layers])

    def forward(self, x: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0):
        """``norm [k]`` with ``eps``: RMSNorm of x before, once for all."""
        return self.linear(x, norm, eps).split(self.sizes, dim=-1)


class SwiGLU(nn.Module):
    """``silu(gate(x)) * up(x)`` (arXiv:2002.05202): ``x [..., k]`` -> ``[..., width]`` in one call;
    the two projections are never stored.

    ``linear`` is the packed :class:`Linear` of the gate's rows above the other's, each padded with
    zero rows to a multiple of 16.
    """

    def __init__(self, linear: Linear, width: int):
        super().__init__()
        rows = 2 * (-(-width // TILE_ROWS) * TILE_ROWS)
        if linear.out_features != rows:
            raise ValueError(
                f"linear: got {linear.out_features} rows, expected {rows} for width {width}"
            )
        self.linear, self.width = linear, width

    @classmethod
    def from_float(
        cls, gate: nn.Module, up: nn.Module, format: str | Format | SparseFormat, mode: str | None = None
    ) -> SwiGLU:
        """Quantises two ``torch.nn.Linear`` layers (or Hugging Face's Conv1D) of the same shape.
        Raises ValueError for different shapes, and what :meth:`Linear.from_float` raises."""
        shapes = [tuple(linear_weight(layer).shape) for layer in (gate, up)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"up: got weight {list(shapes[1])}, gate's is {list(shapes[0])}")
        return cls(_stacked((gate, up), TILE_ROWS, format, mode), shapes[0][0])

    def forward(self, x: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0):
        """``norm [k]`` with ``eps``: RMSNorm of x before."""
        return self.linear(x, norm, eps, swiglu=True)[..., : self.width]
