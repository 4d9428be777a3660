"""Hugging Face model folders: config.json and safetensors, sharded or not."""

from __future__ import annotations

from pathlib import Path

import torch

from memlm.errors import FormatError
from memlm.io import pages, safetensors
from memlm.io.files import read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Folder:
    """A checkpoint (see :class:`memlm.io.checkpoint.Checkpoint`) in a folder; shards are mapped
    when a tensor of theirs is first asked for, ``pages`` as :mod:`memlm.io.pages` has it.

    Raises FileNotFoundError for a folder without config.json or safetensors; FormatError.
    """

    packs = False

    def __init__(self, path: str | Path, pages: str = "mapped"):
        self.path, self._pages = Path(path), pages
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"{self.path}: has no config.json, so it holds no model")
        self.config = read_json(self.path / "config.json")
        self._shards: dict[str, dict[str, torch.Tensor]] = {}
        index = self.path / _INDEX
        if (self.path / _SINGLE).is_file():
            self._file_of = dict.fromkeys(self._shard(_SINGLE), _SINGLE)
        elif index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise FormatError(f"{index}: has no weight_map")
            for name, shard in weight_map.items():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise FormatError(f"{index}: {name}: {shard!r} is not a file of this folder")
            self._file_of = weight_map
        else:
            pickles = ", ".join(sorted(file.name for file in self.path.glob("*.bin")))
            reason = f" ({pickles}: pickles can run code, so they are not read)" if pickles else ""
            raise FileNotFoundError(f"{self.path}: has neither {_SINGLE} nor {_INDEX}{reason}")

    def _shard(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._shards:
            self._shards[file] = safetensors.open_mapped(self.path / file, self._pages)[0]
        return self._shards[file]

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> torch.Tensor:
        """KeyError for an unknown name, FormatError where the index is wrong."""
        file = self._file_of[name]
        shard = self._shard(file)
        if name not in shard:
            raise FormatError(f"{self.path / file}: the index promises {name}, which is not there")
        return shard[name]

    def packed(self, name: str) -> None:
        """Here all tensors are floats."""
        self._file_of[name]

    def coded(self, name: str) -> bool:
        return False

    def maps(self, name: str) -> bool:
        if self._pages == "huge":
            return False
        # What lies at an odd place is a copy, in a storage of its own.
        size = (self.path / self._file_of[name]).stat().st_size
        return self.tensor(name).untyped_storage().nbytes() == size

    def read_ahead(self, name: str) -> None:
        if self.maps(name):
            pages.read_ahead(self.tensor(name))

    def release(self, name: str) -> None:
        if self.maps(name):
            pages.release(self.tensor(name))
