"""Joining other libraries, if and when they are imported."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

# A module of another library -> ours, whose import makes the two known to each other.
JOINS = {
    "transformers.quantizers.auto": "memlm.hf",
    "transformers.modeling_utils": "memlm.hf_attention",
    "peft.tuners.lora.model": "memlm.peft",
}


class _Finder(MetaPathFinder):
    """Finds the modules named in ``JOINS`` as all others would, and imports ours after them."""

    def __init__(self):
        self._busy: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in JOINS or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = find_spec(name)
        finally:
            self._busy.remove(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _join(name)

            spec.loader.exec_module = exec_module
        return spec


def _join(name: str) -> None:
    try:
        import_module(JOINS[name])
    except ImportError as error:  # an older version: it shall go on working by itself
        warnings.warn(f"memlm does not know this version of {name.partition('.')[0]}: {error}")


def join_others() -> None:
    """Imports each of ``JOINS`` where the other module is: now, or as soon as it is imported.  This
    alone imports none."""
    for name in JOINS:
        if name in sys.modules:
            _join(name)
    sys.meta_path.insert(0, _Finder())
