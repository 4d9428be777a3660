"""Packed models as folders: a Hugging Face folder whose matrices are packed.

    config.json             the model's config as Hugging Face has it, with
                            "quantization_config": {"quant_method": "memlm", "version": 2,
                                                    "layers": {module: spec}}   (memlm.layer_specs;
                            empty for a float model)
    model.safetensors       <module>.weight    the codes of a packed layer, memlm/formats.py or
                                               memlm/sparse_formats.py
                            <module>.scales, .offsets, .starts, .places
                            <module>.order     int32 [k], where columns have an order of their own
                            everything else as Hugging Face has it
    tokenizer.json, ...     what else the model came with

Modules have Hugging Face's names.  A program that does not know the format and looks for
``<module>.weight`` finds a tensor that cannot fit, and fails; by other names it would find none, and
many would go on with random weights.

All codes come first in the file, in the model's order: query, key and value, which the reference
decoder multiplies as one matrix, lie one behind the other and are one matrix where they are mapped
(but for the codes of unstructured ones, which end in spare bytes).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from memlm import formats
from memlm._format import FILE_PARTS, FOLDER_VERSION, parse_format
from memlm.errors import FormatError
from memlm.formats import Format, Packed
from memlm.io.checkpoint import Checkpoint, PackedTensor
from memlm.io.files import read_json, sync_folder, temporary_folder
from memlm.io.gguf import GGUF
from memlm.io.huggingface import Folder
from memlm.io.tokenizer import from_gguf
from memlm.layers.packed import dequantize_ordered
from memlm.ops import mode_for
from memlm.sparse_formats import SparsePacked

QUANT_METHOD = "memlm"
# What else a model's folder holds comes along, but for weights in other files, and the index of ours.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf",
                  ".ot", ".index.json")  # fmt: skip
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def is_packed(quantization) -> bool:
    """Whether a config's ``quantization_config`` is this library's."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def quantization_config(specs: dict[str, dict]) -> dict:
    """What config.json says of the packed layers."""
    return {"quant_method": QUANT_METHOD, "version": FOLDER_VERSION, "layers": specs}


class PackedFolder:
    """A packed model as a checkpoint (see :class:`memlm.io.checkpoint.Checkpoint`), mapped.
    ``specs`` are those of its layers, by module.  ``folder`` is one whose config :func:`is_packed`.

    Raises FormatError.
    """

    packs = True

    def __init__(self, folder: Folder):
        self.path, self.config = folder.path, folder.config
        self._folder = folder
        where = f"{self.path / CONFIG_FILE}: quantization_config"
        quantization = self.config["quantization_config"]
        if quantization.get("version") != FOLDER_VERSION:
            given = quantization.get("version")
            raise FormatError(
                f"{where}: version {given!r:.80}; known is {FOLDER_VERSION}: quantise it again"
            )
        specs = quantization.get("layers")
        if not isinstance(specs, dict) or not all(isinstance(s, dict) for s in specs.values()):
            raise FormatError(f"{where}: layers is missing or malformed")
        for module, spec in specs.items():
            owner = spec.get("tied_to", module)
            known = isinstance(owner, str) and owner in specs
            if "tied_to" in spec and (not known or "tied_to" in specs[owner]):
                raise FormatError(
                    f"{where}: layers: {module}: tied to {owner!r:.80}, no layer stored"
                )
        self.specs: dict[str, dict] = specs
        self._stored = set(folder.names())
        parts = {f"{module}.{part}" for module in specs for part in FILE_PARTS.values()}
        owners = [f"{module}.weight" for module, spec in specs.items() if "tied_to" not in spec]
        self._names = owners + [name for name in folder.names() if name not in parts]

    def names(self) -> list[str]:
        return list(self._names)

    def tensor(self, name: str) -> torch.Tensor:
        stored = self.packed(name)
        if stored is None:
            return self._folder.tensor(name)
        return dequantize_ordered(stored.packed, torch.float32, stored.order)

    def packed(self, name: str) -> PackedTensor | None:
        """Its ``mode`` is the layer's, or that of the layer tied to it."""
        module = name.removesuffix(".weight")
        spec = self.specs.get(module)
        if spec is None or "tied_to" in spec or not name.endswith(".weight"):
            return None
        users = [spec, *(s for s in self.specs.values() if s.get("tied_to") == module)]
        mode = next((user["mode"] for user in users if "mode" in user), None)
        parts = {
            part: self._folder.tensor(f"{module}.{file}")
            for part, file in FILE_PARTS.items()
            if f"{module}.{file}" in self._stored
        }
        order = parts.pop("order", None)
        has = {"bias": f"{module}.bias" in self._stored, "order": order is not None}
        try:
            format, n, k = parse_format(spec["format"]), spec["n"], spec["k"]
            if not all(type(size) is int for size in (n, k)):
                raise ValueError(f"n {n!r}, k {k!r} are no sizes")
            if spec["type"] not in ("Linear", "Embedding"):
                raise ValueError(f"type {spec['type']!r:.80}; known are Linear and Embedding")
            if mode is not None:
                mode_for(format, mode)
            packed = (Packed if isinstance(format, Format) else SparsePacked)(format, n, k, **parts)
            scales = None if packed.scales is None else str(packed.scales.dtype)[len("torch.") :]
            if spec.get("scale_dtype") != scales:
                raise ValueError(f"scale_dtype {spec.get('scale_dtype')!r:.80}, but {scales}")
            for what, there in has.items():
                if bool(spec.get(what)) is not there:
                    raise ValueError(f"{what} {spec.get(what)!r:.80}, but the file has it: {there}")
            if order is not None:
                check_order(order, k)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{self.path}: {module}: malformed: {error}") from None
        return PackedTensor(packed, order, mode)

    def coded(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.specs and name.endswith(".weight")

    def maps(self, name: str) -> bool:
        return not self.coded(name) and self._folder.maps(name)

    def _parts(self, name: str) -> list[str]:
        module = name.removesuffix(".weight")
        parts = (
            [f"{module}.{part}" for part in FILE_PARTS.values()] if module in self.specs else [name]
        )
        return [part for part in parts if part in self._stored]

    def read_ahead(self, name: str) -> None:
        for part in self._parts(name):
            self._folder.read_ahead(part)

    def release(self, name: str) -> None:
        for part in self._parts(name):
            self._folder.release(part)


def check_order(order: torch.Tensor, k: int) -> None:
    """Raises ValueError unless ``order`` is a permutation of 0 .. k - 1, int32."""
    right = order.dtype == torch.int32 and order.shape == (k,)
    if not right or not torch.equal(order.sort().values, torch.arange(k, dtype=torch.int32)):
        raise ValueError(
            f"order: {order.dtype} {list(order.shape)} is no permutation of {k} columns"
        )


def file_tensors(
    module: str, packed: Packed | SparsePacked, order: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What the file holds of a packed layer, by its names there."""
    parts = packed.tensors() | ({} if order is None else {"order": order})
    return {f"{module}.{FILE_PARTS[part]}": tensor for part, tensor in parts.items()}


def in_file_order(names: Iterator[str], specs: dict[str, dict]) -> list[str]:
    """``names`` with all codes first, then all scales, and so on; what is not packed last."""
    rank = {f"{m}.{part}": i for m in specs for i, part in enumerate(FILE_PARTS.values())}
    return sorted(names, key=lambda name: rank.get(name, len(FILE_PARTS)))


def neighbours(names: Iterable[str], specs: dict[str, dict]) -> list[list[str]]:
    """Those of ``names`` that stay one behind the other although their sizes are odd: of blocks all
    scales, all offsets, all places, which layers that are multiplied as one have as one."""
    blocks = [module for module, spec in specs.items() if spec["format"].startswith("block/")]
    names = set(names)
    parts = ([f"{module}.{part}" for module in blocks] for part in ("scales", "offsets", "places"))
    return [[name for name in part if name in names] for part in parts]


def check_target(folder: Path) -> None:
    """Raises FileExistsError unless ``folder`` is absent, empty, or a packed model: originals are
    never overwritten."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: exists, and is no folder")
    if not any(not entry.name.startswith(".") for entry in folder.iterdir()):
        return
    config = folder / CONFIG_FILE
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    if not is_packed(quantization):
        raise FileExistsError(f"{folder}: holds something else than a packed memlm model")


@contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """A new folder to write a model's files to; they take their places in ``folder``, one by one and
    config.json last, when the block ends without an exception.  Other files in ``folder`` stay."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(folder) as temporary:
            yield temporary
            move_model(temporary, folder)
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def move_model(temporary: Path, folder: Path) -> dict[str, int]:
    """Moves a model's files to ``folder``; their names and sizes."""
    sizes = file_sizes(temporary)
    # Weights first: a config never describes weights that are not there yet.
    for file in sorted(sizes, key=lambda name: (name != WEIGHTS_FILE, name == CONFIG_FILE, name)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / file, folder / file)
    sync_folder(folder)
    return sizes


def file_sizes(folder: Path) -> dict[str, int]:
    """Path inside ``folder`` -> bytes, of all its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template, generation settings, pooling and what else came with the model."""
    if isinstance(checkpoint, GGUF):
        from_gguf(checkpoint).save(folder)
        return
    src = checkpoint.path
    for file in sorted(src.rglob("*")):
        inside = file.relative_to(src)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not file.is_file() or hidden or inside.name == CONFIG_FILE and len(inside.parts) == 1:
            continue
        if not file.name.lower().endswith(_OTHER_WEIGHTS):
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / inside)


def write_config(path: Path, config: dict, specs: dict[str, dict], dtype: torch.dtype) -> None:
    """config.json of a packed model whose floats are of ``dtype``."""
    config = {
        **{key: value for key, value in config.items() if key != "torch_dtype"},
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": quantization_config(specs),
    }
    path.write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")


def metadata() -> dict[str, str]:
    """What model.safetensors says of itself."""
    return {"format": QUANT_METHOD, "version": str(FOLDER_VERSION), "layout": str(formats.VERSION)}
