"""Checkpoints behind one interface, whatever file they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from memlm import formats


@dataclass(frozen=True)
class PackedTensor:
    """A matrix that a checkpoint stores in codes, in this library's layout; column j multiplies
    x[..., order[j]] where there is an order (int32 [k])."""

    packed: formats.Packed
    order: torch.Tensor | None = None


class Checkpoint(Protocol):
    """A model's config and tensors, under Hugging Face's names and in its layouts."""

    config: dict

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor: mapped where the file allows it.  KeyError for an unknown name."""
        ...

    def packed(self, name: str) -> PackedTensor | None:
        """The matrix as the file has it; None where it is stored as floats, or in codes that no
        format of this library holds exactly.  KeyError for an unknown name."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A Hugging Face folder (safetensors, sharded or not; a packed memlm folder is one) or a GGUF
    file.

    Raises FileNotFoundError, or FormatError for what is neither.
    """
    from memlm.io.gguf import GGUF
    from memlm.io.huggingface import Folder

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return Folder(path) if path.is_dir() else GGUF(path)
