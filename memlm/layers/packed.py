"""What all layers over packed weights share."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from memlm.formats import Format, Packed
from memlm.ops import dequantize

PARTS = ("codes", "scales", "offsets")

# During Module._apply (``.to``, ``.half``): its function -> tensor -> what became of it, so that
# tensors shared by several layers stay shared.  Entries die with the function and the tensor.
_moved: WeakKeyDictionary = WeakKeyDictionary()


def dequantize_ordered(packed: Packed, dtype: torch.dtype, order: torch.Tensor | None):
    """``W [n, k]`` with its columns where x has them: packed column j is column ``order[j]``."""
    w = dequantize(packed, dtype)
    return w if order is None else torch.empty_like(w).index_copy_(1, order.long(), w)


class PackedWeight(torch.Tensor):
    """A packed matrix seen as ``W [n, k]``, for code that reads ``layer.weight``: shape, dtype and
    device cost nothing, any computation dequantises all of it.  Read-only (TypeError)."""

    packed: Packed
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
    """Holds a packed ``W [n, k]`` in the buffers ``codes``, ``scales`` and ``offsets`` (None when
    symmetric).  They move between devices with the module; casts such as ``.half()`` leave them as
    they are and change ``dtype``, the type that ``weight`` appears in."""

    def __init__(self, packed: Packed, dtype: torch.dtype, order: torch.Tensor | None = None):
        super().__init__()
        if order is not None and (order.dtype != torch.int32 or order.shape != (packed.k,)):
            got = f"{order.dtype} {list(order.shape)}"
            raise ValueError(f"order: got {got}, expected torch.int32 [{packed.k}]")
        self.format: Format = packed.format
        self.n, self.k = packed.n, packed.k
        self.dtype = dtype
        for name in PARTS:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("order", order)  # of columns, see Linear

    @property
    def packed(self) -> Packed:
        """The packed matrix, checked against its format (FormatError)."""
        return Packed(self.format, self.n, self.k, self.codes, self.scales, self.offsets)

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
        for name in PARTS:
            self._buffers[name] = getattr(weight.packed, name)

    def _apply(self, fn, recurse=True):
        parts, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
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
        for name in PARTS:
            mine, given = self._buffers[name], state_dict.get(prefix + name)
            if mine is not None and given is not None and given.dtype != mine.dtype:
                error_msgs.append(f"{prefix}{name}: got {given.dtype}, expected {mine.dtype}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
