"""This process's memory as the kernel accounts for it (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FIELDS = {"Rss:": "resident", "Anonymous:": "private"}


@dataclass
class Mapping:
    """A file's pages in this process, in bytes: ``size`` mapped, ``resident`` in memory (shared
    with the page cache), ``private`` copied for this process alone."""

    size: int = 0
    resident: int = 0
    private: int = 0


def resident_bytes() -> int:
    """Bytes of this process's memory that are in RAM, file pages included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: has no VmRSS")


def file_mapping(path: str | Path) -> Mapping:
    """What /proc/self/smaps says of all mappings of ``path``."""
    wanted = str(Path(path).resolve())
    found, inside = Mapping(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split(maxsplit=5)
        if not head.endswith(":"):  # "start-end perms offset device inode path"
            inside = len(rest) == 5 and rest[4] == wanted
            if inside:
                start, end = (int(part, 16) for part in head.split("-"))
                found.size += end - start
        elif inside and head in _FIELDS:
            name = _FIELDS[head]
            setattr(found, name, getattr(found, name) + int(rest[0]) * 1024)
    return found
