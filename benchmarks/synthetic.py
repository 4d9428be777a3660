"""Checkpoints of real models' shapes with random weights: for time and memory, not for quality."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from memlm.io import safetensors
from memlm.models.load import build

# config.json as the models' publishers have it, as far as shapes go.
SHAPES = {
    "1.1b": {  # TinyLlama-1.1B
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "3b": {  # Llama-3.2-3B
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip
_SHARD = 2 << 30  # bytes


def write(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Hugging Face folder of ``shape``, sharded, unless it is there already."""
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", **SHAPES[shape]}
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model = build(config)
    shapes = {
        source: (rows, *model.get_parameter(name).shape[1:])
        for name, sources in model.hf_tensors().items()
        for source, rows in sources.items()
    }
    generator = torch.manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator)

    def read(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=dtype)
        n, k = shapes[name]
        part = (noise * k**-0.5).to(dtype)  # of every tensor the same, but at another place
        start = int(torch.randint(len(part), (), generator=generator))
        return part.roll(start).repeat(-(-n * k // len(part)))[: n * k].view(n, k)

    shards, size = [[]], 0
    for name, sizes in shapes.items():
        count = torch.Size(sizes).numel() * dtype.itemsize
        if size + count > _SHARD and shards[-1]:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += count
    index = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        kinds = {name: (dtype, shapes[name]) for name in names}
        safetensors.write_each(folder / file, kinds, read, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    _tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tokenizer(size: int) -> Tokenizer:
    """A byte-level one with a single merge (llama.cpp wants one), and tokens that no text has."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokens += [f"<{i}>" for i in range(len(tokens), size)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made
