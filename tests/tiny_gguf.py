"""Small GGUF files: llamas written by the gguf library, raw ones for what no library writes."""

import struct

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from . import tiny

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def gguf_name(name):
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *part, last = name.split(".")
    return f"blk.{layer}.{PARTS['.'.join(part)]}.{last}"


def interleave(weight, heads):
    """Row i of a head's first half, then row i of its second, as llama.cpp wants q and k."""
    first_second = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(first_second.swapaxes(1, 2).reshape(weight.shape))


def vocabulary():
    """256 bytes less the last three, a merge of two, and two special tokens."""
    byte = sorted(tiny.pre_tokenizers.ByteLevel.alphabet())
    return ["<|start|>", "<|end|>", *byte[:-3], "th"]


def write_llama(path, model, kinds=(Type.F32,), edit=lambda writer: None, tokens=None):
    """transformers' llama as GGUF; matrices take the ``kinds`` in turn.  ``edit`` may change the
    writer's metadata.  Returns {Hugging Face name: (type, data as stored)}."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    tokens = tokens or vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    edit(writer)
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f".{part}_proj." in name:
                data = interleave(data, heads)
        kind = kinds[len(stored) % len(kinds)] if data.ndim == 2 else Type.F32
        raw = gguf.quants.quantize(data, kind)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        stored[name] = kind, raw
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


# --- raw files -----------------------------------------------------------------------------------


def string(text):
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text


U32, F32, BOOL, TEXT = 4, 6, 7, 8


def key(name, kind, value):
    scalars = {U32: "<I", F32: "<f", BOOL: "<?"}
    packed = string(value) if kind == TEXT else struct.pack(scalars[kind], value)
    return string(name) + struct.pack("<I", kind) + packed


def array(name, kind, values, count=None):
    packed = b"".join(map(string, values)) if kind == TEXT else bytes(values)
    count = len(values) if count is None else count
    return string(name) + struct.pack("<IIQ", 9, kind, count) + packed


def entry(name, shape, kind=0, offset=0):
    """A row of the tensor table; ``shape`` as the file has it, fastest dimension first."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


LLAMA = {
    "general.architecture": (TEXT, "llama"),
    "llama.block_count": (U32, 1), "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 8), "llama.feed_forward_length": (U32, 16),
    "llama.attention.head_count": (U32, 2), "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
}  # fmt: skip


def raw(
    metadata=None, keys=(), table=(), data=b"\0" * 1024, version=3, tensors=None, count=None
):
    """A file with LLAMA's metadata updated by ``metadata`` (None removes), the raw ``keys`` after
    them, an embedding matrix [32, 8] at 0, and the raw ``table`` after it."""
    merged = {k: v for k, v in {**LLAMA, **(metadata or {})}.items() if v is not None}
    keys = [key(name, *value) for name, value in merged.items()] + list(keys)
    rows = [entry("token_embd.weight", (8, 32)), *table]
    head = b"GGUF" + struct.pack("<IQQ", version, len(rows) if tensors is None else tensors,
                                 len(keys) if count is None else count)  # fmt: skip
    head += b"".join(keys) + b"".join(rows)
    return head + b"\0" * (-len(head) % 32) + data
