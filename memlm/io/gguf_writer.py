"""GGUF files that llama.cpp runs, written with the gguf package (the extra ``gguf``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from memlm.errors import FormatError
from memlm.formats import Packed, unpack
from memlm.io.checkpoint import Checkpoint, PackedTensor
from memlm.io.files import replacing
from memlm.io.ggml_types import TYPES
from memlm.io.gguf import GGUF, HF_NAMES, HF_TOP, ROTATED
from memlm.io.tokenizer import PRE_TOKENIZERS, Tokenizer, from_gguf, load_tokenizer
from memlm.models.load import read_tensor

_BY_NAME = {kind.name: (number, kind) for number, kind in TYPES.items()}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BLOCK = 32
# Token types of llama.cpp.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def write_gguf(
    checkpoint: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    dst: Path,
    progress: Callable[[int, int, str], None] | None,
) -> dict:
    """See :func:`memlm.export.export`; llama and mistral models.

    4 bits and fewer become Q4_0 (symmetric) or Q4_1, 8 bits Q8_0, each exactly: a scale for 64 or
    more columns is repeated for each 32.  What these types do not hold (nf4, scales beyond f16, rows
    that are no whole blocks, columns in another order) becomes F16, which rounds.

    Raises ImportError without the gguf package, FormatError for another kind of model or tokenizer.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError:
        raise ImportError("writing GGUF needs the package gguf: pip install memlm[gguf]") from None

    config = checkpoint.config
    if config.get("model_type") not in ("llama", "mistral"):
        kind = config.get("model_type")
        raise FormatError(f"{checkpoint.path}: model_type {kind!r}; written are llama and mistral")
    tokenizer = (
        from_gguf(checkpoint) if isinstance(checkpoint, GGUF) else load_tokenizer(checkpoint.path)
    )
    names = {name: _gguf_name(name) for name in shapes}
    kinds, rounded = {}, []
    for name, shape in shapes.items():
        kinds[name], exact = _kind_of(read_tensor(checkpoint, name, shape))
        checkpoint.release(name)
        if not exact:
            rounded.append(name)

    with replacing(dst) as file:
        # The writer opens what it is to write by name: it gets this file's.
        writer = GGUFWriter(file.name, "llama")
        _add_metadata(writer, config, checkpoint.path.stem)
        _add_tokenizer(writer, tokenizer, config, shapes["model.embed_tokens.weight"][0])
        for name, kind in kinds.items():
            number, type = _BY_NAME[kind]
            *rows, columns = shapes[name]
            size = type.block.itemsize
            stored = (*rows, columns // type.values * size)
            raw = GGMLQuantizationType(number)
            writer.add_tensor_info(
                names[name], stored, np.dtype(np.uint8), int(np.prod(stored)), raw
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, kind) in enumerate(kinds.items(), 1):
            source = read_tensor(checkpoint, name, shapes[name])
            data = _encode(checkpoint, name, source, kind)
            heads = next(
                (config[key] for part, key in ROTATED.items() if f".{part}." in name), None
            )
            if heads is not None:
                data = _interleaved(data, heads)
            writer.write_tensor_data(data.view(np.uint8).reshape(*shapes[name][:-1], -1))
            checkpoint.release(name)
            if progress:
                progress(done, len(kinds), name)
        writer.close()
    return {"files": {dst.name: dst.stat().st_size}, "rounded": rounded}


def _gguf_name(name: str) -> str:
    for theirs, ours in HF_TOP.items():
        if ours == name:
            return theirs
    _, _, layer, *module, kind = name.split(".")
    module = ".".join(module)
    return f"blk.{layer}.{next(t for t, ours in HF_NAMES.items() if ours == module)}.{kind}"


def _kind_of(source: torch.Tensor | PackedTensor) -> tuple[str, bool]:
    """The ggml type for a tensor, and whether it holds it exactly."""
    if isinstance(source, torch.Tensor):
        if source.dim() == 1:  # llama.cpp wants vectors so
            return "F32", True
        return _FLOATS.get(source.dtype, "F32"), source.dtype in _FLOATS
    packed = source.packed
    parts = [packed.scales, *([] if packed.offsets is None else [packed.offsets])]
    exact = all(torch.equal(part.half().float(), part.float()) for part in parts)
    if source.order is not None or packed.k % _BLOCK or packed.format.codebook == "nf" or not exact:
        return "F16", False
    if packed.format.bits == 8:
        return "Q8_0", True
    return ("Q4_1" if packed.offsets is not None else "Q4_0"), True


def _encode(checkpoint: Checkpoint, name: str, source, kind: str) -> np.ndarray:
    """The tensor's rows as stored, [n, bytes or blocks]."""
    block = _BY_NAME[kind][1].block
    if isinstance(block, torch.dtype):
        if isinstance(source, PackedTensor):
            source = checkpoint.tensor(name)
        return source.to(block).contiguous().view(torch.uint8).numpy().reshape(source.shape[0], -1)
    return _blocks(source.packed, block)


def _blocks(packed: Packed, block: np.dtype) -> np.ndarray:
    """Blocks of Q8_0, Q4_0 or Q4_1, [n, k / 32]."""
    q, scales, offsets = unpack(packed)
    blocks = np.empty((packed.n, packed.k // _BLOCK), block)
    for field, values in (("d", scales), ("m", offsets)):
        if values is not None:
            each = values.half().repeat_interleave(
                (packed.format.group or packed.k) // _BLOCK, dim=1
            )
            blocks[field] = each[:, : blocks.shape[1]].numpy()
    q = q.numpy().reshape(*blocks.shape, _BLOCK)
    if packed.format.bits == 8:
        blocks["q"] = q
        return blocks
    if packed.offsets is None:  # Q4_0 subtracts 8
        q = q + np.uint8(8 + int(packed.format.levels[0]))
    blocks["q"] = q[..., :16] | q[..., 16:] << 4
    return blocks


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: the inverse of what reading does."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _add_metadata(writer, config: dict, name: str) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise FormatError(
            f"config: rope_type {rope!r:.80}: GGUF is written for plain rotary positions"
        )
    writer.add_name(name)
    writer.add_quantization_version(2)  # of ggml's block types
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))


def _add_tokenizer(writer, tokenizer: Tokenizer, config: dict, rows: int) -> None:
    parts = json.loads(tokenizer.backend.to_str())
    model, split = parts["model"], parts["pre_tokenizer"]
    pre = next((name for name, make in PRE_TOKENIZERS.items() if _same_split(make(), split)), None)
    if model.get("type") != "BPE" or pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise FormatError(
            f"tokenizer: {model.get('type')} after {split!r:.120}; GGUF is written for byte-level BPE "
            f"that splits as {known} do"
        )
    special = {token["id"]: token["special"] for token in parts["added_tokens"]}
    vocabulary = tokenizer.backend.get_vocab()
    if len(vocabulary) > rows:
        raise FormatError(f"tokenizer: {len(vocabulary)} tokens, but {rows} embeddings")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [_UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i] = token
        types[i] = _NORMAL if i not in special else _CONTROL if special[i] else _USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_ids:
        writer.add_eos_token_id(tokenizer.eos_ids[0])
    writer.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _same_split(made, given: dict) -> bool:
    def relevant(part):  # trim_offsets concerns offsets only
        if isinstance(part, dict):
            return {k: relevant(v) for k, v in part.items() if k != "trim_offsets"}
        return [relevant(item) for item in part] if isinstance(part, list) else part

    return relevant(json.loads(made.__getstate__())) == relevant(given)
