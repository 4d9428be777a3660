"""Checkpoints behind one interface, whatever file they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from memlm.formats import Packed
from memlm.io.pages import check_how
from memlm.sparse_formats import SparsePacked


@dataclass(frozen=True)
class PackedTensor:
    """A matrix that a checkpoint stores in codes, in this library's layout.

    Column j multiplies ``x[..., order[j]]`` where there is an ``order`` (int32 [k]); ``mode`` is the
    arithmetic that the checkpoint asks for, if any.
    """

    packed: Packed | SparsePacked
    order: torch.Tensor | None = None
    mode: str | None = None


class Checkpoint(Protocol):
    """A model's config and tensors, under Hugging Face's names and in its layouts.

    ``packs`` says whether any tensor is stored in codes.
    """

    path: Path
    config: dict
    packs: bool

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in floats: mapped where the file allows it, dequantised (to f32) where it
        holds codes.  KeyError for an unknown name."""
        ...

    def packed(self, name: str) -> PackedTensor | None:
        """The same in the codes that the file holds, to the bit; None where it holds floats, or
        codes that none of this library's formats holds exactly.  KeyError for an unknown name."""
        ...

    def coded(self, name: str) -> bool:
        """Whether the tensor is stored in codes."""
        ...

    def maps(self, name: str) -> bool:
        """Whether :meth:`tensor` gives the file's own pages."""
        ...

    def read_ahead(self, name: str) -> None:
        """Has the kernel start reading a tensor's bytes."""
        ...

    def release(self, name: str) -> None:
        """Lets go of a tensor's bytes in memory, as far as they are the file's; using it reads them
        again."""
        ...


def open_checkpoint(path: str | Path, pages: str = "mapped") -> Checkpoint:
    """A packed memlm folder, another Hugging Face folder (safetensors, sharded or not; in floats,
    compressed-tensors, GPTQ or AWQ), or a GGUF file.

    ``pages``: of the tensors in memory, see :mod:`memlm.io.pages`.

    Raises FileNotFoundError, or FormatError for what is none of them.
    """
    from memlm.io.gguf import GGUF
    from memlm.io.huggingface import Folder
    from memlm.io.packed_folder import PackedFolder, is_packed
    from memlm.io.quantized import open_quantized

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return GGUF(path, pages)
    folder = Folder(path, check_how(pages))
    quantization = folder.config.get("quantization_config")
    if quantization is None:
        return folder
    return PackedFolder(folder) if is_packed(quantization) else open_quantized(folder)
