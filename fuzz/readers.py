"""What is fuzzed: every reader of files, on bytes that anybody may have written.

A reader must refuse what it does not understand with FormatError (or FileNotFoundError for a part that
is missing); everything else that escapes it, a crash, or a long wait is a finding.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import memlm
from memlm import arrays
from memlm.errors import FormatError
from memlm.io import mapped, safetensors
from memlm.io.checkpoint import open_checkpoint
from memlm.io.gguf import GGUF
from memlm.io.tokenizer import from_gguf, load_tokenizer
from memlm.models.load import load

REFUSALS = (FormatError, FileNotFoundError)
# A reader may take memory in proportion to its file only: what a tiny file says it holds is not read.
_LARGEST = 1 << 24
# Of the layers in a sparse folder.
_PATTERNS = {
    "re:.*up_proj": "2:4/int4", "re:.*down_proj": "unstructured/int4", "re:.*gate": "block/f32",
}  # fmt: skip


def gguf(folder: Path, data: bytes) -> None:
    """A GGUF file: its table, every tensor in floats and in codes, its tokenizer, the model."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    file = GGUF(path)
    for name in file.names():
        if file.tensors[file._names[name]].end < _LARGEST:
            file.tensor(name)
            file.packed(name)
    try:
        from_gguf(file).encode("a text")
    except FormatError:
        pass
    load(path)


def safetensors_file(folder: Path, data: bytes) -> None:
    """A safetensors file, by torch and by numpy."""
    path = folder / "x.safetensors"
    path.write_bytes(data)
    tensors, metadata = safetensors.open_mapped(path)
    assert all(isinstance(t, torch.Tensor) for t in tensors.values()) and isinstance(metadata, dict)
    arrays = mapped.open_mapped(path)
    assert arrays.keys() == tensors.keys()
    safetensors.verify(path)


def config(folder: Path, data: bytes) -> None:
    """config.json of a folder whose weights are sound: a float model's or a packed one's."""
    (folder / "config.json").write_bytes(data)
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        checkpoint.packed(name)
    load(folder)


def tokenizer(folder: Path, data: bytes) -> None:
    """tokenizer.json and tokenizer_config.json, split at the first zero byte."""
    backend, _, settings = data.partition(b"\0")
    (folder / "tokenizer.json").write_bytes(backend)
    if settings:
        (folder / "tokenizer_config.json").write_bytes(settings)
    made = load_tokenizer(folder)
    made.decode(made.encode("a text"))
    try:
        made.apply_chat([{"role": "user", "content": "x"}])
    except ValueError:  # no template, or one that refuses
        pass


def index(folder: Path, data: bytes) -> None:
    """The index of a sharded folder."""
    (folder / "model.safetensors.index.json").write_bytes(data)
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        checkpoint.tensor(name)


def sparse(folder: Path, data: bytes) -> None:
    """model.safetensors of a packed folder with sparse layers of every pattern: what is not refused
    must not lead the kernels astray."""
    (folder / "model.safetensors").write_bytes(data)
    model = load(folder)
    with torch.inference_mode():
        model(torch.arange(6).view(1, 6), model.new_cache("f32"))
    x = np.ones((2, 64), np.float32)
    for w in arrays.load(folder).values():
        if isinstance(w, arrays.SparsePacked):
            arrays.matmul(x, w)


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "gguf": gguf, "safetensors": safetensors_file, "config": config, "packed": config,
    "tokenizer": tokenizer, "index": index, "sparse": sparse,
}  # fmt: skip


def surroundings(name: str, folder: Path) -> None:
    """Sound files that a reader finds around the fuzzed one."""
    from tests import tiny
    from tests.sparse import prune_

    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32, "num_hidden_layers": 1}
    if name == "sparse":  # several blocks
        sizes |= {"hidden_size": 64, "intermediate_size": 64}
    if name in ("config", "packed", "index", "sparse"):
        model = tiny.llama(folder, **sizes)
    config = memlm.QuantConfig("int4", "int8", "int8")
    if name == "sparse":
        prune_(prune_(model, "block/f32"), "2:4/int4").save_pretrained(folder)
        config = memlm.QuantConfig("block/int4", "int8", "int8", targets=_PATTERNS)
    if name in ("packed", "sparse"):
        memlm.quantize_files(folder, folder.parent / "packed", config)
        for file in (folder.parent / "packed").iterdir():
            file.replace(folder / file.name)
    if name == "index":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def seeds(name: str) -> list[bytes]:
    """Sound inputs, from which the fuzzer starts."""
    from tests import tiny, tiny_gguf

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        folder.mkdir()
        surroundings(name, folder)
        if name in ("config", "packed"):
            return [(folder / "config.json").read_bytes()]
        if name == "sparse":
            return [(folder / "model.safetensors").read_bytes()]
        if name == "index":
            file = "model-00001-of-00001.safetensors"
            names = safetensors.open_mapped(folder / file)[0]
            return [json.dumps({"weight_map": dict.fromkeys(names, file)}).encode()]
        if name == "gguf":
            model = tiny.llama(
                folder, hidden_size=64, intermediate_size=32, vocab_size=260, num_hidden_layers=1
            )
            kinds = [
                tiny_gguf.Type[kind] for kind in ("Q4_0", "Q4_1", "Q8_0", "F16", "Q5_0", "Q5_1")
            ]
            tiny_gguf.write_llama(folder / "model.gguf", model, kinds)
            return [(folder / "model.gguf").read_bytes(), tiny_gguf.raw()]
        if name == "safetensors":
            tensors = {"a": torch.arange(6).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
            safetensors.write(folder / "x", tensors, {"format": "pt"})
            return [(folder / "x").read_bytes()]
        tiny.tokenizer(folder)
        settings = {
            "bos_token": "a",
            "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        }
        return [(folder / "tokenizer.json").read_bytes() + b"\0" + json.dumps(settings).encode()]
