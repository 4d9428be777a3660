"""GGUF files, memory-mapped (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

A file is a header, key-value metadata, a table of tensors, and the tensors' data.  Everything is
checked against the file's size before it is read: a malformed file raises FormatError.
memlm/io/ggml_types.py has the types of tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memlm.errors import FormatError
from memlm.formats import TILE_ROWS, Format, Packed, layout, pack
from memlm.io import pages
from memlm.io.checkpoint import PackedTensor
from memlm.io.ggml_types import TYPES, TensorType, dequantize

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


# Weights decoded at a time: a few MB of codes and of what is made of them.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor of the table; ``shape`` as torch has it, slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int  # from the start of the file

    @property
    def end(self) -> int:
        blocks = math.prod(self.shape) // self.type.values  # Python integers: no overflow
        return self.offset + blocks * self.type.block.itemsize


class _Cursor:
    """Reads forward over a file's bytes; never beyond their end."""

    def __init__(self, data: memoryview, path: Path):
        self.data, self.path, self.at = data, path, 0

    def error(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what} (at byte {self.at})")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.error(f"truncated: {count} bytes wanted, {len(self.data) - self.at} left")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def scalar(self, format: str):
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def string(self) -> str:
        # Files hold hundreds of thousands of them: no calls that can be spared.
        data, start = self.data, self.at + 8
        end = start + int.from_bytes(data[self.at : start], "little")
        if end > len(data):
            raise self.error(f"truncated: a string to byte {end}, {len(data) - self.at} bytes left")
        try:
            text = str(data[start:end], "utf-8")
        except UnicodeDecodeError:
            raise self.error(
                f"a string that is not UTF-8: {bytes(data[start:end][:40])!r}"
            ) from None
        self.at = end
        return text

    def value(self, kind: int):
        """A metadata value; arrays do not nest here."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error(f"metadata type {kind} is not read here")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        raise self.error(f"metadata type {kind} in an array is not read here")


class GGUF:
    """A GGUF file as a checkpoint: Hugging Face names, layouts and config (llama architecture).

    ``metadata`` and ``tensors`` hold what the file says, under its own names.

    Raises FileNotFoundError, or FormatError for a file that is malformed or of a kind that is not
    read here.
    """

    packs = True

    def __init__(self, path: str | Path, how: str = "mapped"):
        """``how`` the file's bytes lie in memory: :mod:`memlm.io.pages`."""
        self.path, self._how = Path(path), pages.check_how(how)
        with open(self.path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise FormatError(f"{self.path}: not a GGUF file; expected one, or a folder")
        self._bytes = pages.open_file(self.path, how)
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, Tensor] = {}
        self._parse(_Cursor(memoryview(self._bytes.numpy()), self.path))
        self.config = _config(self)
        self._names = _hf_names(self)

    def _parse(self, cursor: _Cursor) -> None:
        cursor.take(4)
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise cursor.error(f"GGUF version {version}; read are 2 and 3, little-endian")
        tensor_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        for _ in range(metadata_count):
            key = cursor.string()
            if key in self.metadata:
                raise cursor.error(f"metadata {key:.80} is there twice")
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise cursor.error(f"metadata general.alignment is {alignment!r:.80}")
        table = [self._table_entry(cursor) for _ in range(tensor_count)]
        end = start = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in sorted(table, key=lambda entry: entry[3]):
            if name in self.tensors:
                raise FormatError(f"{self.path}: tensor {name:.80} is there twice")
            tensor, problem = Tensor(name, shape, kind, start + offset), None
            if offset % alignment:
                problem = f"has offset {offset}, which is no multiple of {alignment}"
            elif tensor.offset < end:
                problem = "overlaps the tensor before it"
            elif tensor.end > len(self._bytes):
                problem = f"ends at byte {tensor.end}, the file at {len(self._bytes)} (truncated?)"
            if problem:
                raise FormatError(f"{self.path}: tensor {name:.80} {problem}")
            self.tensors[name], end = tensor, tensor.end

    @staticmethod
    def _table_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], TensorType, int]:
        name, dims = cursor.string(), cursor.scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise cursor.error(f"tensor {name:.80} has {dims} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dims))  # fastest dimension first
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        if kind not in TYPES:
            known = ", ".join(f"{t.name} ({number})" for number, t in TYPES.items())
            raise cursor.error(f"tensor {name:.80} is of ggml type {kind}; read are {known}")
        if 0 in shape or shape[0] % TYPES[kind].values:
            raise cursor.error(f"tensor {name:.80}: shape {shape} does not fit {TYPES[kind].name}")
        return name, shape[::-1], TYPES[kind], offset

    def read(self, name: str) -> torch.Tensor:
        """A tensor under the file's own name: F32, F16 and BF16 mapped, quantised types
        dequantised to f32.  KeyError for an unknown name."""
        tensor = self.tensors[name]
        if isinstance(tensor.type.block, torch.dtype):
            raw = self._bytes[tensor.offset : tensor.end]
            return raw.view(tensor.type.block).view(tensor.shape)
        out = torch.empty(tensor.shape)
        rows = out.view(-1, tensor.shape[-1])
        for start, blocks in self._chunks(tensor, None):
            chunk = torch.from_numpy(dequantize(tensor.type, blocks.reshape(-1)))
            rows[start : start + len(blocks)] = chunk.view(len(blocks), -1)
        return out

    def _chunks(self, tensor: Tensor, order: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, blocks [rows, blocks of a row]), some tiles of rows at a time, the rows in
        ``order``."""
        raw = self._bytes[tensor.offset : tensor.end].numpy().view(tensor.type.block)
        blocks = raw.reshape(-1, tensor.shape[-1] // tensor.type.values)
        step = max(1, _CHUNK // (tensor.shape[-1] * TILE_ROWS)) * TILE_ROWS
        for start in range(0, len(blocks), step):
            rows = slice(start, start + step) if order is None else order[start : start + step]
            yield start, blocks[rows]

    def names(self) -> list[str]:
        return list(self._names)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor under Hugging Face's name, in its layout.  KeyError for an unknown name."""
        tensor = self.read(self._names[name])
        order = self._row_order(name)
        return tensor if order is None else tensor[torch.from_numpy(order)]

    def packed(self, name: str) -> PackedTensor | None:
        """A matrix in the file's codes, see :class:`memlm.io.checkpoint.Checkpoint`."""
        tensor = self.tensors[self._names[name]]
        if tensor.type.format is None or len(tensor.shape) != 2:
            return None
        format = Format.parse(tensor.type.format)
        whole: Packed | None = None
        for start, blocks in self._chunks(tensor, self._row_order(name)):
            q, scales, offsets = tensor.type.decode(blocks.reshape(-1))
            q = torch.from_numpy(q).reshape(len(blocks), -1)
            if format.bits < 8:
                q = (q + tensor.type.zero).to(torch.uint8)
            values = [
                None if v is None else torch.from_numpy(v).reshape(len(blocks), -1)
                for v in (scales, offsets)
            ]
            try:
                part = pack(q, *values, format)
            except ValueError as error:  # NaN or Inf
                raise FormatError(f"{self.path}: tensor {tensor.name:.80}: {error}") from None
            if whole is None:
                shapes = layout(format, *tensor.shape, part.scales.dtype)
                whole = Packed(
                    format,
                    *tensor.shape,
                    **{p: torch.empty(s, dtype=d) for p, (s, d) in shapes.items()},
                )
            tile = start // TILE_ROWS
            for mine, new in zip(whole.tensors().values(), part.tensors().values()):
                mine[tile : tile + len(new)] = new
        return PackedTensor(whole)

    def coded(self, name: str) -> bool:
        return self.tensors[self._names[name]].type.decode is not None

    def maps(self, name: str) -> bool:
        return self._how != "huge" and not self.coded(name) and self._row_order(name) is None

    def _stored(self, name: str) -> torch.Tensor:
        tensor = self.tensors[self._names[name]]
        return self._bytes[tensor.offset : tensor.end]

    def read_ahead(self, name: str) -> None:
        if self._how != "huge":
            pages.read_ahead(self._stored(name))

    def release(self, name: str) -> None:
        if self._how != "huge":  # or it would be lost
            pages.release(self._stored(name))

    def _row_order(self, name: str) -> np.ndarray | None:
        """llama.cpp rotates neighbouring pairs (2i, 2i + 1), Hugging Face the halves (i, i + d/2):
        the file has the rows of q and k in the former's order."""
        key = next((key for part, key in ROTATED.items() if f".{part}." in name), None)
        if key is None:
            return None
        rows, heads = self.tensors[self._names[name]].shape[0], self.config[key]
        half = self.config["head_dim"] // 2
        if rows != heads * 2 * half:
            raise FormatError(
                f"{self.path}: {name}: {rows} rows, the metadata says {heads} heads of "
                f"{self.config['head_dim']}"
            )
        return np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def _hf_names(file: GGUF) -> dict[str, str]:
    """Hugging Face name -> the file's name."""
    names = {}
    for name in file.tensors:
        parts = name.split(".")
        if name in HF_TOP:
            names[HF_TOP[name]] = name
        elif len(parts) == 4 and parts[0] == "blk" and parts[2] in HF_NAMES:
            names[f"model.layers.{parts[1]}.{HF_NAMES[parts[2]]}.{parts[3]}"] = name
        elif name == "rope_freqs.weight":
            raise FormatError(f"{file.path}: scaled rotary frequencies ({name}) are not read here")
        else:
            raise FormatError(f"{file.path}: tensor {name!r:.80} is not known in a llama model")
    return names


def _config(file: GGUF) -> dict:
    """The metadata as a Hugging Face config.json has it."""

    def error(key: str, known: str) -> FormatError:
        given = f"{file.metadata[key]!r:.80}" if key in file.metadata else "missing"
        return FormatError(f"{file.path}: metadata {key} is {given}; expected {known}")

    def get(key: str, kind: type, default=None):
        value = file.metadata.get(f"llama.{key}", default)
        if type(value) not in (kind, int) or not 0 < value < 2**31:
            raise error(f"llama.{key}", f"a positive {kind.__name__}")
        return kind(value)

    def token(key: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and (type(value) is not int or value < 0):
            raise error(f"tokenizer.ggml.{key}", "a token's number")
        return value

    # What would change the model's results if it went unnoticed.
    for key, known in (
        ("general.architecture", ("llama",)),
        ("split.count", (None, 0, 1)),
        ("llama.expert_count", (None, 0)),
        ("llama.rope.scaling.type", (None, "none")),
        ("llama.rope.scale_linear", (None, 1.0)),
    ):
        if file.metadata.get(key) not in known:
            raise error(key, " or ".join(repr(k) for k in known if k is not None))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{file.path}: has no token_embd.weight matrix")
    layers, heads = get("block_count", int), get("attention.head_count", int)
    if layers > len(file.tensors):
        raise error("llama.block_count", f"at most the number of tensors, {len(file.tensors)}")
    width = get("embedding_length", int)
    head_dim = get("attention.key_length", int, width // heads)
    if head_dim % 2:
        raise FormatError(f"{file.path}: heads of {head_dim} values; expected an even number")
    if get("rope.dimension_count", int, head_dim) != head_dim:
        raise error("llama.rope.dimension_count", f"the whole head, {head_dim}")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": get("rope.freq_base", float, 10000.0),
        "max_position_embeddings": get("context_length", int),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": token("eos_token_id"),
    }
