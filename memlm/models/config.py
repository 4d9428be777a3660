"""Reading the numbers of a Hugging Face config.json, which may hold anything."""

from __future__ import annotations

import sys

from memlm.errors import FormatError

# Far beyond any published model; a hostile config shall not keep the loader building layers.
MAX_LAYERS = 4096
_MAX = 2**31 - 1


def integer(config: dict, key: str, default: int | None = None, most: int = _MAX) -> int:
    """``config[key]``, or ``default`` where it is absent or null: 1 to ``most``, else
    FormatError."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise FormatError(f"config: {key} is {value!r}, expected an integer from 1 to {most}")
    return value


def number(config: dict, key: str, default: float | None = None) -> float:
    """``config[key]``, or ``default`` where it is absent or null: finite and positive, else
    FormatError."""
    value = config.get(key)
    value = default if value is None else value
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not 0 < value <= sys.float_info.max:
        raise FormatError(f"config: {key} is {value!r}, expected a positive number")
    return float(value)
