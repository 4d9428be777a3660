"""The real models as transformers has them."""

import torch

from memlm import data


def smollm2_of_transformers():
    """transformers' model, filled with what the gguf library reads."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(data.smollm2_gguf())
    field = {name.removeprefix("llama."): f.contents() for name, f in reader.fields.items()}
    heads, kv_heads = field["attention.head_count"], field["attention.head_count_kv"]
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    config = LlamaConfig(
        vocab_size=len(field["tokenizer.ggml.tokens"]),
        hidden_size=field["embedding_length"],
        intermediate_size=field["feed_forward_length"],
        num_hidden_layers=field["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=field["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["rope.freq_base"]},
        max_position_embeddings=field["context_length"],
        tie_word_embeddings=True,
    )

    def halves(weight, heads):  # rows (0, 1), (2, 3) ... of a head -> all first ones, all second
        size = weight.shape[0] // heads
        order = [h * size + i for h in range(heads) for s in (0, 1) for i in range(s, size, 2)]
        return weight[order]

    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for i in range(config.num_hidden_layers):
        for theirs, name in (
            ("input_layernorm", "attn_norm"), ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"), ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
        ):  # fmt: skip
            state[f"model.layers.{i}.{theirs}.weight"] = tensors[f"blk.{i}.{name}.weight"]
        for part, count in (("q", heads), ("k", kv_heads)):
            weight = halves(tensors[f"blk.{i}.attn_{part}.weight"], count)
            state[f"model.layers.{i}.self_attn.{part}_proj.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were on meta
    return model.eval()
