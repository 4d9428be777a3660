"""Reading JSON, and writing a file so that it is there complete or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from memlm.errors import FormatError


def read_json(path: Path) -> dict:
    """A JSON object from a file; FileNotFoundError, or FormatError where it is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the name ``path`` when the block ends without an exception.

    It lies beside ``path`` meanwhile and, with ``sync``, reaches the disk before it is renamed; what
    was at ``path`` before stays until then, and stays for those who have it mapped.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(inside: Path) -> Iterator[Path]:
    """A hidden folder inside ``inside`` that is gone when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=".", dir=inside))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
