"""What runs where: the account of a model's layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

from memlm.convert import LEFT_ALONE, memory_of
from memlm.cpu import isa
from memlm.layers import Linear, PackedModule, SparseLinear
from memlm.layers.linear import is_conv1d
from memlm.ops import _registry
from memlm.sparse_formats import density


@dataclass(frozen=True)
class Row:
    """One module that holds weights.

    ``bytes``: what its tensors take, 0 for those shared with an earlier row; ``float_bytes``: the
    same in f32; ``density``: the share of its weights that is stored.  ``op``, ``isa``, ``mode``
    say which kernel runs; ``reason`` says why it is the slow reference, or why memlm left a module as it
    is.
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
    density: float = 1.0


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
        head = ("layer", "type", "shape", "format", "kernel", "bytes", "of f32", "note")
        table = [head]
        for row in self.rows:
            kernel = " ".join(part for part in (row.op, row.isa, row.mode) if part)
            share = f"{row.bytes / row.float_bytes:.0%}" if row.float_bytes else ""
            sizes = (f"{row.bytes:,}", share)
            sparse = f"{row.density:.0%} stored" if row.density < 1 else ""
            note = row.reason or sparse
            table.append((row.name, row.type, row.shape, row.format, kernel, *sizes, note))
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
    its bytes, and, where memlm left it as it is, why.  Raises TypeError for another object."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    rows, seen = [], set()
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if not (parameters or isinstance(module, PackedModule) or hasattr(module, LEFT_ALONE)):
            continue
        tensors = [*parameters, *module.buffers(recurse=False)]
        own = [t for t in tensors if memory_of(t) not in seen]
        seen.update(memory_of(t) for t in own)
        describe = _packed_row if isinstance(module, PackedModule) else _float_row
        rows.append(describe(name, module, tensors, own))
    return Explanation(rows)


def _packed_row(name: str, module: PackedModule, tensors: list, own: list) -> Row:
    weights = module.n * module.k if any(t is module.first for t in own) else 0
    others = [p for p in module.parameters(recurse=False) if p is not module.codes]
    others = sum(p.numel() for p in others if any(p is t for t in own))
    kernel, why = _registry.selected(module.op, module.codes.device.type)
    shared = "" if weights else "(shares the tensors of an earlier layer)"
    sparse = isinstance(module, SparseLinear)
    return Row(
        name=name,
        type=type(module).__name__,
        shape=f"{module.n}x{module.k}",
        format=module.format.name,
        op=module.op,
        isa=_runs_on(kernel, module.codes.device),
        mode=module.mode if isinstance(module, Linear) else "",
        bytes=_bytes(own),
        float_bytes=4 * (weights + others),
        reason="; ".join(part for part in (why, shared) if part),
        density=density(module.packed) if sparse else 1.0,
    )


def _runs_on(kernel: str, device: torch.device) -> str:
    """The kernel's instruction set: a CPU's name for it, or what sort of kernel it is and for which
    device."""
    if kernel == "cpp":
        return isa()
    if device.type == "cuda" and torch.cuda.is_available():
        return f"{kernel} sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    return f"{kernel} {device.type}"


def _float_row(name: str, module: nn.Module, tensors: list, own: list) -> Row:
    largest = max(tensors, key=torch.Tensor.numel, default=None)
    return Row(
        name=name,
        type=type(module).__name__,
        shape="" if largest is None else "x".join(map(str, largest.shape)),
        format="" if largest is None else str(largest.dtype).removeprefix("torch."),
        op="torch",
        isa="",
        mode="",
        bytes=_bytes(own),
        float_bytes=4 * sum(t.numel() for t in own),
        reason=getattr(module, LEFT_ALONE, None) or _why_not(module),
    )


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _why_not(module: nn.Module) -> str:
    if all(p.dim() < 2 for p in module.parameters(recurse=False)):
        return "no matrix"
    if isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module):
        return "quantize_ was not asked"
    return f"memlm has no packed {type(module).__name__}"
