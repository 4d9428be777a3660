"""What is compiled of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from memlm.kernels._targets import Target


@dataclass(frozen=True)
class Specimen:
    name: str
    kernel: object
    # Of pointers and tuples; other arguments are 32-bit integers unless constants.  "i32:16" are multiples of 16,
    # None and numbers stand for themselves.
    types: dict[str, object]
    constants: dict = field(default_factory=dict)
    config: str = ""
    warps: int = 4
    stages: int = 3
    divisible: tuple[str, ...] = ()  # integers that are multiples of 16

    @property
    def signature(self) -> dict[str, object]:
        kinds = {name: "constexpr" for name in self.constants} | self.types
        return {name: _signature(kinds.get(name, "i32")) for name in self.kernel.arg_names}

    def _leaves(self) -> list[tuple[tuple[int, ...], object]]:
        names = enumerate(self.kernel.arg_names)
        return [leaf for i, name in names if name in self.types for leaf in _leaves(self.types[name], (i,))]

    @property
    def constexprs(self) -> dict[tuple[int, ...], object]:
        """By place among the arguments, and within them."""
        named = {(self.kernel.arg_names.index(name),): value for name, value in self.constants.items()}
        return named | {path: kind for path, kind in self._leaves() if not isinstance(kind, str)}

    @property
    def aligned(self) -> list[tuple[int, ...]]:
        """Places of pointers, and of integers that are multiples of 16."""
        named = [(self.kernel.arg_names.index(name),) for name in self.divisible]
        of_types = [path for path, kind in self._leaves() if isinstance(kind, str) and (kind[0] == "*" or ":" in kind)]
        return named + of_types


def _leaves(kind, path: tuple[int, ...]) -> list[tuple[tuple[int, ...], object]]:
    if isinstance(kind, tuple):
        return [leaf for i, part in enumerate(kind) for leaf in _leaves(part, (*path, i))]
    return [(path, kind)]


def _signature(kind):
    """As Triton writes it."""
    if isinstance(kind, tuple):
        parts = [_signature(part) for part in kind]
        return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)
    return kind.split(":")[0] if isinstance(kind, str) else "constexpr"

NAMES = {"fp16": "f16", "bf16": "bf16", "fp32": "f32"}


def dtypes(target: Target) -> tuple[str, ...]:
    return ("fp16",) if target.arch == 75 else ("fp16", "bf16")
