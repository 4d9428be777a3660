"""What all layers over packed weights share."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from memlm import formats, sparse_formats
from memlm.formats import Format, Packed
from memlm.ops import dequantize
from memlm.sparse_formats import SparseFormat, SparsePacked, SparseTensors

# During Module._apply (``.to``, ``.half``): its function -> tensor -> what became of it, so that
# tensors shared by several layers stay shared.  Entries die with the function and the tensor.
_moved: WeakKeyDictionary = WeakKeyDictionary()


def dequantize_ordered(
    packed: Packed | SparsePacked, dtype: torch.dtype, order: torch.Tensor | None
):
    """``W [n, k]`` with its columns where x has them: packed column j is column ``order[j]``."""
    w = dequantize(packed, dtype)
    return w if order is None else torch.empty_like(w).index_copy_(1, order.long(), w)


def stack_rows(parts: Sequence[Packed | SparsePacked]) -> Packed | SparsePacked:
    """:func:`memlm.formats.stack_rows`, or that of :mod:`memlm.sparse_formats`."""
    return _rows_of(parts[0]).stack_rows(parts)


def split_rows(packed: Packed | SparsePacked, sizes: Sequence[int]) -> list:
    """:func:`memlm.formats.split_rows`, or that of :mod:`memlm.sparse_formats`."""
    return _rows_of(packed).split_rows(packed, sizes)


def _rows_of(packed):
    return sparse_formats if isinstance(packed, SparsePacked) else formats


class PackedWeight(torch.Tensor):
    """A packed matrix seen as ``W [n, k]``, for code that reads ``layer.weight``: shape, dtype and
    device cost nothing, any computation dequantises all of it.  Read-only (TypeError)."""

    packed: Packed | SparsePacked
    order: torch.Tensor | None
    _is_hf_initialized = True  # transformers gives random values to weights that a file lacks

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype, order: torch.Tensor | None = None):
        return torch.Tensor._make_wrapper_subclass(
            cls, (packed.n, packed.k), dtype=dtype, device=packed.codes.device
        )

    def __init__(self, packed: Packed, dtype: torch.dtype, order: torch.Tensor | None = None):
        self.packed, self.order = packed, order

    @property
    def data(self) -> PackedWeight:
        """Itself: writes to a dequantised copy would be lost without a word."""
        return self

    @data.setter
    def data(self, data: torch.Tensor) -> None:
        raise TypeError("weight: is packed and cannot be changed (data)")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            raise TypeError(f"weight: is packed and cannot be changed ({func})")
        args, kwargs = tree_map_only(
            cls, lambda w: dequantize_ordered(w.packed, w.dtype, w.order), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"PackedWeight({list(self.shape)}, format={self.packed.format}, dtype={self.dtype})"


class PackedModule(nn.Module):
    """Holds a packed ``W [n, k]`` in the buffers that ``PARTS`` names (None where it has no such
    part, as ``offsets`` when symmetric); codes that are floats are a parameter.  They move between
    devices with the module; casts such as ``.half()`` leave them as they are and change ``dtype``,
    the type that ``weight`` appears in."""

    PARTS = ("codes", "scales", "offsets")

    def __init__(
        self,
        packed: Packed | SparseTensors,
        dtype: torch.dtype,
        order: torch.Tensor | None = None,
    ):
        super().__init__()
        if order is not None and (order.dtype != torch.int32 or order.shape != (packed.k,)):
            got = f"{order.dtype} {list(order.shape)}"
            raise ValueError(f"order: got {got}, expected torch.int32 [{packed.k}]")
        self.format: Format | SparseFormat = packed.format
        self.n, self.k = packed.n, packed.k
        self.dtype = dtype
        for name in self.PARTS:
            part = getattr(packed, name)
            if name == "codes" and part.is_floating_point():
                if not isinstance(part, nn.Parameter):
                    part = nn.Parameter(part)
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)
        self.register_buffer("order", order)  # of columns, see Linear

    @property
    def packed(self) -> Packed | SparsePacked:
        """The packed matrix, checked against its format (FormatError)."""
        return Packed(self.format, self.n, self.k, *self._parts().values())

    @property
    def first(self) -> torch.Tensor:
        """A tensor of W's that is not empty, as codes may be: where it lies says whose W it is."""
        return next(t for t in self._parts().values() if t is not None and t.numel())

    def _parts(self) -> dict[str, torch.Tensor | None]:
        """The tensors that PARTS names."""
        return {name: getattr(self, name) for name in self.PARTS}

    @property
    def weight(self) -> torch.Tensor:
        """``W [n, k]`` in ``dtype``, dequantised by whoever computes with it (PackedWeight).

        Assigning the ``weight`` of another layer ties the two: they hold the same tensors.  Raises
        TypeError for another tensor, ValueError for another format or shape.
        """
        if torch.compiler.is_compiling():  # drops what is not used, and knows no wrappers
            return dequantize_ordered(self.packed, self.dtype, self.order)
        return PackedWeight(self.packed, self.dtype, self.order)

    @weight.setter
    def weight(self, weight: PackedWeight) -> None:
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"weight: got {type(weight).__name__}, expected that of a memlm layer")
        given, mine = ((p.format.name, p.n, p.k) for p in (weight.packed, self.packed))
        if given != mine:
            raise ValueError(f"weight: got {given}, expected {mine}")
        if weight.order is not self.order:
            raise ValueError("weight: its columns are in an order of their own")
        for name in self.PARTS:
            held = self._parameters if name in self._parameters else self._buffers
            held[name] = getattr(weight.packed, name)

    def _apply(self, fn, recurse=True):
        parts, self._buffers = self._buffers, {}
        values = self._parameters.get("codes")
        kept = [] if values is None else [values, values.grad]

        def moving(tensor):
            new = fn(tensor)
            keeps = new.dtype != tensor.dtype and any(tensor is one for one in kept)
            return tensor.to(new.device) if keeps else new

        try:
            super()._apply(moving if kept else fn, recurse)
        finally:
            self._buffers = parts
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        moved = _moved.setdefault(fn, WeakTensorKeyDictionary())
        for name, old in list(parts.items()):
            if old is None:
                continue
            new = moved.get(old)
            if new is None:
                new = fn(old)
                if new.dtype != old.dtype:
                    new = old.to(new.device)
                if new is not old:
                    moved[old] = new
            parts[name] = new
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # copy_() would convert without a word: f32 scales into f16 may overflow.
        for name, mine in self._parts().items():
            given = state_dict.get(prefix + name)
            if mine is not None and given is not None and given.dtype != mine.dtype:
                error_msgs.append(f"{prefix}{name}: got {given.dtype}, expected {mine.dtype}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
