"""From any checkpoint that memlm reads to files of other programs, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from memlm.formats import Packed
from memlm.io import safetensors
from memlm.io.checkpoint import Checkpoint, PackedTensor, open_checkpoint
from memlm.io.files import temporary_folder
from memlm.io.packed_folder import (
    CONFIG_FILE, WEIGHTS_FILE, PackedFolder, copy_others, move_model,
)  # fmt: skip
from memlm.models.load import build_for, check_names, other_tensors, read_tensor
from memlm.sparse_formats import to_dense

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
KINDS = (*FLOATS, "gguf", "compressed-tensors")

Progress = Callable[[int, int, str], None]


def export(
    src: str | Path, dst: str | Path, to: str = "bf16", progress: Progress | None = None
) -> dict:
    """Writes the model at ``src`` (anything that :func:`memlm.load` reads) to ``dst``, which must not
    exist yet.

    to: ``"f32"``, ``"bf16"``, ``"f16"``: a Hugging Face folder with plain safetensors, codes
        dequantised (bf16 and f16 round).  ``"gguf"``: a file that llama.cpp runs.
        ``"compressed-tensors"``: a folder that transformers and vLLM load.  Packed matrices keep
        their codes wherever the target has a type that holds them exactly; sparse ones are written
        with their zeros, for none of these files leaves them out.
    progress: called with (done, total, name) after each tensor.

    Returns ``{"files": file name -> bytes, "rounded": names of tensors that the target's types do
    not hold exactly}``.

    Raises what :func:`memlm.load` raises, FileExistsError, ValueError for another ``to`` or what the
    target cannot hold.
    """
    src, dst = Path(src), Path(dst)
    if to not in KINDS:
        raise ValueError(f"to: got {to!r}, accepted are {', '.join(KINDS)}")
    if dst.exists():
        raise FileExistsError(f"{dst}: exists already")
    checkpoint = open_checkpoint(src)
    shapes = shapes_of(checkpoint)
    if isinstance(checkpoint, PackedFolder):
        checkpoint = _Dense(checkpoint)
    if to == "gguf":
        from memlm.io.gguf_writer import write_gguf

        return write_gguf(checkpoint, shapes, dst, progress)
    if to == "compressed-tensors":
        return _compressed_tensors(checkpoint, shapes, dst, progress)
    return _floats(checkpoint, shapes, dst, FLOATS[to], progress)


class _Dense:
    """A packed folder whose sparse matrices have codes for all their weights, or are floats."""

    def __init__(self, folder: PackedFolder):
        self._folder = folder

    def __getattr__(self, name: str):
        return getattr(self._folder, name)

    def packed(self, name: str) -> PackedTensor | None:
        stored = self._folder.packed(name)
        if stored is None or isinstance(stored.packed, Packed):
            return stored
        floats = stored.packed.format.is_float
        return None if floats else replace(stored, packed=to_dense(stored.packed))


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The checkpoint's name -> shape of every tensor of the model."""
    model = build_for(checkpoint)
    prefix = check_names(model, checkpoint)
    shapes = {}
    for name, sources in model.hf_tensors().items():
        columns = tuple(model.get_parameter(name).shape[1:])
        shapes |= {prefix + source: (rows, *columns) for source, rows in sources.items()}
    return shapes | other_tensors(model, checkpoint, prefix)


def _floats(checkpoint: Checkpoint, shapes, dst: Path, dtype, progress) -> dict:
    done, rounded = 0, []

    def read(name: str) -> torch.Tensor:
        nonlocal done
        tensor = read_tensor(checkpoint, name, shapes[name], dequantize=True)
        made = tensor.to(dtype)
        if made is not tensor and not torch.equal(made.to(tensor.dtype), tensor):
            rounded.append(name)
        checkpoint.release(name)
        done += 1
        if progress:
            progress(done, len(shapes), name)
        return made

    config = {
        k: v
        for k, v in checkpoint.config.items()
        if k not in ("quantization_config", "torch_dtype")
    }
    config["dtype"] = str(dtype).removeprefix("torch.")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(dst.parent) as temporary:
        kinds = {name: (dtype, shape) for name, shape in shapes.items()}
        safetensors.write_each(temporary / WEIGHTS_FILE, kinds, read, {"format": "pt"})
        copy_others(checkpoint, temporary)
        (temporary / CONFIG_FILE).write_text(
            json.dumps(config, indent=1, ensure_ascii=False), "utf-8"
        )
        files = move_model(temporary, dst)
    return {"files": files, "rounded": rounded}


def _compressed_tensors(checkpoint: Checkpoint, shapes, dst: Path, progress) -> dict:
    from memlm.io import compressed_tensors

    model = build_for(checkpoint)
    prefix = check_names(model, checkpoint)
    embeddings = {
        prefix + source.removesuffix(".weight")
        for name, sources in model.hf_tensors().items()
        for source in sources
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    }
    dst.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(dst.parent) as temporary:
        copy_others(checkpoint, temporary)
        rounded = compressed_tensors.write(
            temporary, checkpoint, shapes, floats=embeddings, progress=progress
        )
        return {"files": move_model(temporary, dst), "rounded": rounded}
