"""What runs where: the account of a model's layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from memlm.convert import LEFT_ALONE
from memlm.cpu import isa
from memlm.layers import Linear, PackedModule


@dataclass(frozen=True)
class Row:
    """One module that holds weights.

    ``bytes``: what its tensors take, 0 for those shared with an earlier row; ``float_bytes``: the
    same in f32.  ``op``, ``isa``, ``mode`` say which kernel runs; of a module that memlm left as
    it is ``reason`` says why.
    """

    name: str
    type: str
    shape: str
    format: str
    op: str
    isa: str
    mode: str
    bytes: int
    float_bytes: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Rows, one for each module that holds weights; ``str()`` is a table."""

    rows: list[Row]

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    @property
    def float_bytes(self) -> int:
        return sum(row.float_bytes for row in self.rows)

    def to_dict(self) -> dict:
        return {
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        head = ("layer", "type", "shape", "format", "kernel", "bytes", "of f32", "left alone because")
        table = [head]
        for row in self.rows:
            kernel = " ".join(part for part in (row.op, row.isa, row.mode) if part)
            share = f"{row.bytes / row.float_bytes:.0%}" if row.float_bytes else ""
            table.append(
                (row.name, row.type, row.shape, row.format, kernel, f"{row.bytes:,}", share, row.reason)
            )
        share = f"{self.bytes / max(1, self.float_bytes):.0%}"
        table.append(("total", "", "", "", "", f"{self.bytes:,}", share, ""))
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        right = (5, 6)
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in table
        )


def explain(model: nn.Module) -> Explanation:
    """For every module of ``model`` that holds weights: the kernel and instruction set that run,
    its bytes, and, where memlm left it as it is, why."""
    rows, seen = [], set()
    for name, module in model.named_modules():
        tensors = list(module.named_parameters(recurse=False))
        tensors += [(n, b) for n, b in module.named_buffers(recurse=False)]
        if not any(isinstance(t, nn.Parameter) for _, t in tensors) and not isinstance(
            module, PackedModule
        ):
            continue
        new = [t for _, t in tensors if t.data_ptr() not in seen or t.is_meta]
        seen.update(t.data_ptr() for t in new)
        size = sum(t.numel() * t.element_size() for t in new)
        if isinstance(module, PackedModule):
            weights = module.n * module.k if any(t is module.codes for t in new) else 0
            bias = getattr(module, "bias", None)
            floats = 4 * (weights + (0 if bias is None else bias.numel()))
            on_cpu = module.codes.device.type == "cpu"
            rows.append(
                Row(
                    name=name,
                    type=type(module).__name__,
                    shape=f"{module.n}x{module.k}",
                    format=module.format.name,
                    op=module.op if on_cpu else f"{module.op} (reference)",
                    isa=isa() if on_cpu else module.codes.device.type,
                    mode=module.mode if isinstance(module, Linear) else "",
                    bytes=size,
                    float_bytes=floats,
                    reason="" if weights else "(shares the tensors of an earlier layer)",
                )
            )
        else:
            largest = max((t for _, t in tensors), key=lambda t: t.numel())
            rows.append(
                Row(
                    name=name,
                    type=type(module).__name__,
                    shape="x".join(map(str, largest.shape)),
                    format=str(largest.dtype).removeprefix("torch."),
                    op="torch",
                    isa="",
                    mode="",
                    bytes=size,
                    float_bytes=4 * sum(t.numel() for t in new),
                    reason=getattr(module, LEFT_ALONE, None) or _why_not(module),
                )
            )
    return Explanation(rows)


def _why_not(module: nn.Module) -> str:
    if all(p.dim() < 2 for p in module.parameters(recurse=False)):
        return "no matrix"
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return "quantize_ was not asked"
    return f"memlm has no packed {type(module).__name__}"
