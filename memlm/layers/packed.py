"""What all layers over packed weights share."""

from __future__ import annotations

import torch
from torch import nn

from memlm.formats import Format, Packed


class PackedModule(nn.Module):
    """Holds a packed ``W [n, k]`` in the buffers ``codes``, ``scales`` and ``offsets`` (None when
    symmetric).  They move between devices with the module; casts such as ``.half()`` leave them as
    they are."""

    def __init__(self, packed: Packed):
        super().__init__()
        self.format: Format = packed.format
        self.n, self.k = packed.n, packed.k
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("offsets", packed.offsets)

    @property
    def packed(self) -> Packed:
        """The packed matrix, checked against its format (FormatError)."""
        return Packed(self.format, self.n, self.k, self.codes, self.scales, self.offsets)

    def share(self, packed: Packed) -> None:
        """Holds the tensors of ``packed`` from now on, shared with whoever else holds them."""
        self.codes, self.scales, self.offsets = packed.codes, packed.scales, packed.offsets

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers[name] for name in ("scales", "offsets")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
