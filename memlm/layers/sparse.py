"""A linear layer over a packed weight with many zeros."""

from __future__ import annotations

import torch
from torch import nn

from memlm.formats import Packed
from memlm.layers.linear import Linear, linear_weight
from memlm.ops import dispatch_sparse, mode_for
from memlm.quantize import sparse_quantize
from memlm.sparse_formats import SparseFormat, SparsePacked, SparseTensors


class SparseLinear(Linear):
    """A :class:`Linear` whose ``W`` is stored without most of its zeros, as
    ``memlm/sparse_formats.py`` draws: blocks, two of four, or a bitmap.

    Values of blocks that are floats (``block/f32``, ``block/bf16``) are the parameter ``codes``:
    they can be trained, and what is not stored stays zero, whatever an optimizer does.  All others
    are buffers and frozen, as in Linear.  ``mode`` is ``"fast"`` or ``"accurate"``; floats are
    multiplied in f32 in either.
    """

    PARTS = (*Linear.PARTS, "starts", "places")

    @classmethod
    def from_float(
        cls, linear: nn.Module, format: str | SparseFormat, mode: str | None = None
    ) -> SparseLinear:
        """Of a ``torch.nn.Linear`` (or Conv1D) the weights that are not zero, rounded to the
        format's values.  The bias parameter is taken over, not copied.

        Raises TypeError for another module, and what :func:`memlm.quantize.sparse_quantize` raises.
        """
        format = SparseFormat.parse(format)
        mode = mode_for(format, mode)
        packed = sparse_quantize(linear_weight(linear), format)
        return cls(packed, linear.bias, mode, linear.weight.dtype)

    @property
    def packed(self) -> SparsePacked | SparseTensors:
        """The packed matrix, checked against its format (FormatError): all of it, but where nothing
        is known of the tensors' contents (on the meta device, and when a graph is traced)."""
        unknown = self.codes.is_meta or torch.compiler.is_compiling()
        kind = SparseTensors if unknown else SparsePacked
        return kind(self.format, self.n, self.k, *self._parts().values())

    @property
    def op(self) -> str:
        """The operation that forward runs."""
        return "block_sparse_matmul" if self.format.pattern == "block" else "w4_sparse_matmul"

    def forward(
        self,
        x: torch.Tensor,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        swiglu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As :meth:`Linear.forward`."""
        parts, own = self._buffers, self._parameters
        codes = own["codes"] if "codes" in own else parts["codes"]
        x, norm = self._ordered(x, norm, eps)
        weights = (codes, *(parts[name] for name in self.PARTS[1:]), self.n, self.k)
        around = (norm, eps, swiglu, residual)
        return dispatch_sparse(x, self.format, *weights, own["bias"], self._mode, *around)

    def topk(
        self, x: torch.Tensor, k: int, norm: torch.Tensor | None = None, eps: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Linear.topk`; all elements are computed before the k are chosen."""
        bias = self._parameters["bias"]
        x, norm, bias = (None if t is None else t.float() for t in (x, norm, bias))
        x, norm = self._ordered(x, norm, eps)
        parts = (*self._parts().values(), self.n, self.k)
        y = dispatch_sparse(x, self.format, *parts, bias, self._mode, norm, eps, False, None)
        # Of equal elements the lowest index first, NaN before all numbers.
        values, indices = torch.sort(y, dim=-1, descending=True, stable=True)
        return values[..., :k], indices[..., :k]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # What starts and places say is checked before it takes the place of what is there.
        given = {name: state_dict.get(prefix + name) for name in self.PARTS}
        mine = self._parts()
        if all((given[name] is None) == (mine[name] is None) for name in given):
            try:
                SparsePacked(self.format, self.n, self.k, **given)
            except ValueError as error:
                error_msgs.append(f"{prefix[:-1]}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def linear_of(
    packed: Packed | SparseTensors,
    bias: torch.Tensor | None = None,
    mode: str | None = None,
    dtype: torch.dtype = torch.float32,
    order: torch.Tensor | None = None,
) -> Linear:
    """The layer of a packed matrix of either kind: arguments as :class:`Linear` has them."""
    kind = SparseLinear if isinstance(packed, SparseTensors) else Linear
    return kind(packed, bias, mode, dtype, order)
