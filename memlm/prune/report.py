"""What pruning did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer ``W [n, k]``.

    sparsity: the share of zeros (with a format: of what is not stored).
    error: ``||X W'^T - X W^T|| / ||X W^T||`` on what the layer was given from the calibration, by
        the layers before it as they are now; None without a calibration.
    bytes, dense_bytes: of the weights as they are now, and with the same type of values but all
        of them stored.
    """

    name: str
    n: int
    k: int
    pattern: str
    format: str
    sparsity: float
    error: float | None
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What :func:`memlm.prune_` did: its ``layers``, and those ``left`` alone, name -> reason."""

    method: str
    layers: tuple[LayerReport, ...]
    left: dict[str, str]

    @property
    def sparsity(self) -> float:
        """The share of zeros in all layers together."""
        weights = sum(layer.n * layer.k for layer in self.layers)
        zeros = sum(layer.sparsity * layer.n * layer.k for layer in self.layers)
        return zeros / weights if weights else 0.0

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers)

    def to_dict(self) -> dict:
        """Plain JSON."""
        totals = {name: getattr(self, name) for name in ("sparsity", "bytes", "dense_bytes")}
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        """A table."""
        rows = [("layer", "n x k", "pattern", "values", "zeros", "error", "MB", "dense MB")]
        for x in self.layers:
            error = "" if x.error is None else f"{x.error:.4f}"
            sizes = (f"{x.bytes / 1e6:.3f}", f"{x.dense_bytes / 1e6:.3f}")
            shape = f"{x.n} x {x.k}"
            rows.append((x.name, shape, x.pattern, x.format, f"{x.sparsity:.1%}", error, *sizes))
        totals = (f"{self.bytes / 1e6:.2f}", f"{self.dense_bytes / 1e6:.2f}")
        rows.append((f"all {len(self.layers)}", "", "", "", f"{self.sparsity:.1%}", "", *totals))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [c.ljust(w) for c, w in zip(row[:4], widths)]
            cells += [c.rjust(w) for c, w in zip(row[4:], widths[4:])]
            lines.append("  ".join(cells).rstrip())
        lines += [f"{name}: left alone: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)
