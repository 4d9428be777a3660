"""Formats by name, without tensors: :mod:`memlm.formats` draws them and packs torch tensors,
:mod:`memlm.arrays` numpy arrays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

VERSION = 1
TILE_ROWS = 16  # rows side by side in a block
LANE_K = 4  # consecutive k of one row inside a 32-bit lane
ACT_GROUP = 32  # activations share a scale over 32 k; K is padded to a multiple of it
GROUPS = {4: (32, 64, 128), 8: (0, 32, 64, 128)}  # 0: one scale per row
# What int4 and int8 alone mean: the most accurate of each, at 5.0 and 8.5 bits per weight.
DEFAULTS = {"int4": "int4a-g32", "int8": "int8-g32"}

_NAME = re.compile(r"int(?P<bits>[48])(?P<asym>a?)-(?:row|g(?P<group>[1-9]\d*))")


@dataclass(frozen=True)
class Format:
    """What a packed matrix holds: ``bits`` per code, ``group`` of k per scale (0: the whole row),
    ``symmetric`` or with an offset.

    Raises ValueError for a combination that no kernel executes.
    """

    bits: int
    group: int = 0
    symmetric: bool = True

    def __post_init__(self):
        if self.bits not in GROUPS:
            raise ValueError(f"bits: got {self.bits!r}, accepted are {sorted(GROUPS)}")
        if self.group not in GROUPS[self.bits]:
            raise ValueError(
                f"group: got {self.group!r}, accepted for {self.bits} bits are {GROUPS[self.bits]}"
                " (0: one scale per row)"
            )
        if self.bits == 8 and not self.symmetric:
            raise ValueError("symmetric: 8-bit weights are symmetric only")

    @property
    def name(self) -> str:
        suffix = f"g{self.group}" if self.group else "row"
        return f"int{self.bits}{'' if self.symmetric else 'a'}-{suffix}"

    @classmethod
    def parse(cls, spec: str | Format) -> Format:
        """The format of a name such as ``int4-g32``; ``int4`` and ``int8`` mean ``DEFAULTS``."""
        if isinstance(spec, Format):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"format: got {type(spec).__name__}, accepted are a name or a Format")
        match = _NAME.fullmatch(DEFAULTS.get(spec, spec))
        if not match:
            raise ValueError(
                f"format: got {spec!r}, accepted are int4, int4-gG, int4a-gG, int8, int8-gG "
                "(G = 32, 64, 128) and int8-row"
            )
        return cls(int(match["bits"]), int(match["group"] or 0), not match["asym"])

    def padded_k(self, k: int) -> int:
        """``k`` rounded up to a whole number of groups (and of activation groups)."""
        step = max(self.group, ACT_GROUP)
        return -(-k // step) * step

    def groups(self, k: int) -> int:
        """Scales per row."""
        return self.padded_k(k) // self.group if self.group else 1

    def bytes_per_weight(self, scale_bytes: int = 2) -> float:
        """Stored bytes per weight for large n and k (without padding)."""
        per_group = scale_bytes * (1 if self.symmetric else 2)
        return self.bits / 8 + (per_group / self.group if self.group else 0)

    def __str__(self) -> str:
        return self.name
