"""GGUF files, read over a memory map (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

A file is a header, key-value metadata, a table of tensors, and the tensors' data.  Everything is
checked against the file's size before it is read: a malformed file raises FormatError.

Of the quantised types those are read whose blocks hold 32 values:

    Q8_0   f16 d | 32 x int8 q              w = d q
    Q4_0   f16 d | 16 x uint8               w = d (q - 8)    byte i: value i in the low nibble,
    Q4_1   f16 d | f16 m | 16 x uint8       w = d q + m              value i + 16 in the high one
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memlm.errors import FormatError

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class TensorType:
    name: str
    block: np.dtype  # one block as stored
    values: int  # per block


def _blocks(*fields) -> np.dtype:
    return np.dtype(list(fields))


TYPES = {
    0: TensorType("F32", np.dtype("<f4"), 1),
    1: TensorType("F16", np.dtype("<f2"), 1),
    30: TensorType("BF16", np.dtype("<u2"), 1),
    8: TensorType("Q8_0", _blocks(("d", "<f2"), ("q", "i1", 32)), 32),
    2: TensorType("Q4_0", _blocks(("d", "<f2"), ("q", "u1", 16)), 32),
    3: TensorType("Q4_1", _blocks(("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)), 32),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the table; ``shape`` as torch has it, slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int  # from the start of the file


class _Cursor:
    """Reads forward over the map; never beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str):
        raise FormatError(f"{self.path}: {what} (at byte {self.at})")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            self.fail(f"truncated: {count} bytes wanted, {len(self.data) - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, format: str):
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, in_array: bool = False):
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or in_array:
            self.fail(f"metadata type {kind} is not known here")
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind].replace("?", "b1"))
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if count * 8 > len(self.data) - self.at:  # a string is at least its length
            self.fail(f"truncated: an array of {count} does not fit")
        return [self.value(kind, in_array=True) for _ in range(count)]


class GGUF:
    """A GGUF file as a checkpoint: Hugging Face names, layouts and config (llama architecture).

    ``metadata`` and ``tensors`` hold what the file says, under its own names.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise FormatError(f"{self.path}: empty") from None
        cursor = _Cursor(self._data, self.path)
        if cursor.take(4) != b"GGUF":
            raise FormatError(f"{self.path}: not a GGUF file")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise FormatError(f"{self.path}: GGUF version {version}; read are 2 and 3")
        tensor_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        self.metadata = {}
        for _ in range(metadata_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        table = [self._tensor_entry(cursor) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise FormatError(f"{self.path}: general.alignment is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        for name, shape, type, offset in table:
            if name in self.tensors:
                raise FormatError(f"{self.path}: two tensors are named {name!r}")
            self.tensors[name] = tensor = Tensor(name, shape, type, start + offset)
            end = tensor.offset + self._blocks_of(tensor) * type.block.itemsize
            if end > len(self._data):
                raise FormatError(
                    f"{self.path}: {name} ends at byte {end}, the file at {len(self._data)}"
                )
        self.config = _config(self)
        self._names = _hf_names(self)

    @staticmethod
    def _tensor_entry(cursor: _Cursor):
        name, dims = cursor.string(), cursor.scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            cursor.fail(f"{name}: {dims} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dims))
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        if kind not in TYPES:
            known = ", ".join(t.name for t in TYPES.values())
            cursor.fail(f"{name}: tensor type {kind} is not read here; read are {known}")
        if 0 in shape or shape[0] % TYPES[kind].values:
            cursor.fail(f"{name}: shape {shape} does not fit {TYPES[kind].name}")
        return name, shape[::-1], TYPES[kind], offset

    @staticmethod
    def _blocks_of(tensor: Tensor) -> int:
        count = 1
        for size in tensor.shape:  # Python integers: no overflow
            count *= size
        return count // tensor.type.values

    def read(self, name: str) -> torch.Tensor:
        """A tensor under the file's own name, in f32 (F16 and BF16 as they are).  A copy."""
        tensor = self.tensors[name]
        raw = np.frombuffer(
            self._data, tensor.type.block, self._blocks_of(tensor), tensor.offset
        )
        kind = tensor.type.name
        if kind == "BF16":
            flat = torch.from_numpy(raw.astype(np.int16)).view(torch.bfloat16)
        elif kind in ("F32", "F16"):
            flat = torch.from_numpy(raw.astype(raw.dtype.newbyteorder("=")))
        else:
            flat = torch.from_numpy(_dequantize(raw, kind).reshape(-1))
        return flat.view(tensor.shape)

    def names(self) -> list[str]:
        return list(self._names)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self.read(self._names[name])
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }.get(name.split(".")[-2] if "." in name else "")
        if heads is None:
            return tensor
        # llama.cpp rotates neighbouring pairs (2i, 2i+1), Hugging Face the halves (i, i + d/2):
        # the rows of q and k are stored in the former's order.
        rows = tensor.view(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
        return rows.transpose(1, 2).reshape(tensor.shape)


def _dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    d = raw["d"].astype(np.float32)[:, None]
    if kind == "Q8_0":
        return raw["q"] * d
    out = np.empty((len(raw), 32), np.float32)
    np.multiply(raw["q"] & 15, d, out=out[:, :16])
    np.multiply(raw["q"] >> 4, d, out=out[:, 16:])
    out += raw["m"].astype(np.float32)[:, None] if kind == "Q4_1" else -8 * d
    return out


_HF_NAMES = {
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
_HF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _hf_names(file: GGUF) -> dict[str, str]:
    """Hugging Face name -> the file's name."""
    names = {}
    for name in file.tensors:
        if name == "rope_freqs.weight":
            raise FormatError(f"{file.path}: scaled rotary frequencies are not read here")
        parts = name.split(".")
        if name in _HF_TOP:
            names[_HF_TOP[name]] = name
        elif len(parts) == 4 and parts[0] == "blk" and parts[2] in _HF_NAMES:
            names[f"model.layers.{parts[1]}.{_HF_NAMES[parts[2]]}.{parts[3]}"] = name
        else:
            raise FormatError(f"{file.path}: tensor {name!r} is not known in a llama model")
    return names


def _config(file: GGUF) -> dict:
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise FormatError(f"{file.path}: architecture {architecture!r}; read is 'llama'")

    def get(key: str, kind: type, default=None):
        value = file.metadata.get(f"llama.{key}", default)
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
            raise FormatError(f"{file.path}: metadata llama.{key} is {value!r}")
        return value

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{file.path}: has no token_embd.weight matrix")
    heads = get("attention.head_count", int)
    width = get("embedding_length", int)
    head_dim = get("attention.key_length", int, width // heads)
    if get("rope.dimension_count", int, head_dim) != head_dim:
        raise FormatError(f"{file.path}: rotates only part of each head, which is not read here")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": get("rope.freq_base", float, 10000.0),
        "max_position_embeddings": get("context_length", int),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
