"""What to prune, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from memlm._format import Format, SparseFormat
from memlm.prune.patterns import BLOCK, PATTERNS
from memlm.selection import Selection

METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "sensitivity")


@dataclass(frozen=True)
class PruneConfig(Selection):
    """What :func:`memlm.prune_` takes out of a model.

    method: ``"magnitude"``; ``"wanda"`` (arXiv:2306.11695), magnitude times the norm of what the
        weight multiplies; ``"sparsegpt"`` (arXiv:2301.00774), which also changes the weights that
        stay so that they make up for those that go.
    sparsity: the share of zeros, 0 to 1; of ``2:4`` 0.5.
    pattern: ``"unstructured"``, ``"2:4"`` or ``"block"`` (memlm/sparse_formats.py).
    block: rows and columns of a block, multiples of 16 and 32; a block is 0 or it is not.
    format: None, weights stay floats; or what those that stay are rounded to, ``"int4"``,
        ``"int4-g32"``, ``"bf16"`` and so on, as the pattern can hold (``"int4"``: as in
        ``block/int4``).  The layers are then :class:`memlm.layers.SparseLinear`.
    allocation: ``"uniform"``, every layer has this sparsity; ``"sensitivity"``, all layers together
        have it, and each as much as its share of the error allows (not for ``2:4``).
    targets: pattern -> sparsity of layers that differ (None: left alone), ``ignore``: patterns of
        layers to leave alone, as in :class:`memlm.QuantConfig`.
    damping: of SparseGPT, in means of the diagonal of the inputs' products.
    samples, length: of a calibration that is text, how many pieces of how many tokens.

    Raises TypeError or ValueError for what is not accepted.
    """

    method: str = "sparsegpt"
    sparsity: float = 0.5
    pattern: str = "unstructured"
    block: tuple[int, int] = BLOCK
    format: str | Format | None = None
    allocation: str = "uniform"
    targets: Mapping[str, float | None] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    damping: float = 0.01
    samples: int = 128
    length: int = 512

    def __post_init__(self):
        for name, value, accepted in (
            ("method", self.method, METHODS),
            ("pattern", self.pattern, PATTERNS),
            ("allocation", self.allocation, ALLOCATIONS),
        ):
            if value not in accepted:
                raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(accepted)}")
        self._check_share("sparsity", self.sparsity)
        self.check_selection("sparsity")
        for pattern, share in self.targets.items():
            if share is not None:
                self._check_share(f"targets: {pattern}", share)
        whole = [isinstance(size, int) and size > 0 for size in self.block]
        if len(whole) != 2 or not all(whole) or any(s % b for s, b in zip(self.block, BLOCK)):
            raise ValueError(
                f"block: got {self.block!r}, accepted are (rows, columns), multiples of "
                f"{BLOCK[0]} and {BLOCK[1]}"
            )
        if self.allocation == "sensitivity" and self.pattern == "2:4":
            raise ValueError("allocation: 2:4 has the same sparsity everywhere")
        if not _is_number(self.damping) or not 0 < self.damping < math.inf:
            raise ValueError(f"damping: got {self.damping!r}, accepted is a positive number")
        for name, value in (("samples", self.samples), ("length", self.length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, accepted are integers from 1 on")
        self.sparse_format  # what the pattern cannot hold is refused now

    def _check_share(self, name: str, share: float) -> None:
        if self.pattern == "2:4":
            if share != 0.5:
                raise ValueError(f"{name}: got {share!r}, of 2:4 it is 0.5")
        elif not _is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share!r}, accepted is 0 to 1")

    @property
    def sparse_format(self) -> SparseFormat | None:
        """What pruned layers are stored in; None where they stay floats."""
        return None if self.format is None else SparseFormat.parse(f"{self.pattern}/{self.format}")

    def sparsity_of(self, name: str, kind: str) -> float | None:
        """Of the layer ``name`` of class ``kind``; None: left alone."""
        return self.target_of(name, kind, self.sparsity)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
