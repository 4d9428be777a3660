"""Which layers of a model a config means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


class Selection:
    """What configs with ``targets`` (pattern -> what such layers get, None: left alone; the first
    that matches counts) and ``ignore`` (patterns of layers that are left alone) share.

    A pattern is a layer's name, the name of its class (``"Linear"``), or ``"re:"`` and a regular
    expression that matches from the name's start, as in compressed-tensors' ``targets``.
    """

    targets: Mapping
    ignore: Sequence[str]

    def check_selection(self, what: str) -> None:
        """Raises TypeError unless ``targets`` is pattern -> ``what`` and ``ignore`` a list of
        patterns, ValueError for a pattern that is no regular expression."""
        if not isinstance(self.targets, Mapping):
            raise TypeError(
                f"targets: got {type(self.targets).__name__}, expected pattern -> {what}"
            )
        if isinstance(self.ignore, str) or not all(isinstance(p, str) for p in self.ignore):
            raise TypeError(f"ignore: got {self.ignore!r}, expected a list of patterns")
        for pattern in (*self.targets, *self.ignore):
            try:
                re.compile(pattern[3:] if pattern.startswith("re:") else "")
            except re.error as error:
                raise ValueError(f"pattern {pattern!r}: {error}") from None

    def target_of(self, name: str, kind: str, default):
        """What the layer ``name`` of class ``kind`` gets; ``default`` where no pattern matches."""
        if any(_matches(pattern, name, kind) for pattern in self.ignore):
            return None
        for pattern, target in self.targets.items():
            if _matches(pattern, name, kind):
                return target
        return default

    def check_patterns(self, layers: Iterable[tuple[str, str]]) -> None:
        """Raises ValueError for a pattern that matches none of these layers, (name, class)."""
        layers = list(layers)
        for pattern in (*self.targets, *self.ignore):
            if not any(_matches(pattern, *layer) for layer in layers):
                raise ValueError(f"pattern {pattern!r}: matches no layer of the model")


def _matches(pattern: str, name: str, kind: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, kind)
