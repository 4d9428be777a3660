"""The reference decoder: rotary positions, grouped-query attention, RMSNorm, SwiGLU (the Llama
architecture, arXiv:2302.13971; GQA arXiv:2305.13245; RoPE arXiv:2104.09864).

Query, key and value are one linear layer, and so are gate and up: fewer, larger matmuls.  Linear
layers and embeddings are plain torch modules until :func:`memlm.quantize_` replaces them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memlm.errors import FormatError


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.  ``rope`` is Hugging Face's rope parameters (``rope_type`` and so on)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict
    max_positions: int
    tied: bool
    qkv_bias: bool

    @classmethod
    def from_hf(cls, config: dict) -> DecoderConfig:
        """From Hugging Face's config of a ``llama``, ``mistral`` or ``qwen2`` model.

        Raises FormatError for what this decoder does not compute.
        """
        kind = config.get("model_type")
        if kind not in ("llama", "mistral", "qwen2"):
            raise FormatError(f"config: model_type {kind!r}; known are llama, mistral, qwen2")
        if config.get("hidden_act", "silu") != "silu":
            raise FormatError(f"config: hidden_act {config['hidden_act']!r}; known is 'silu'")
        if config.get("mlp_bias") or (kind == "llama" and config.get("attention_bias")):
            raise FormatError("config: biases beyond those of query, key and value are not known")
        if config.get("use_sliding_window") or (kind == "mistral" and config.get("sliding_window")):
            raise FormatError("config: sliding-window attention is not known")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if rope["rope_type"] not in ("default", "linear", "llama3"):
            raise FormatError(
                f"config: rope_type {rope['rope_type']!r}; known are default, linear, llama3"
            )

        def size(key: str, default=None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FormatError(f"config: {key} is {value!r}, expected a positive integer")
            return value

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        made = cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope,
            max_positions=size("max_position_embeddings", 2048),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
        )
        if made.heads % made.kv_heads or made.head_dim % 2:
            raise FormatError(
                f"config: {made.heads} heads over {made.kv_heads} key-value heads of size "
                f"{made.head_dim} do not divide evenly"
            )
        return made


class KVCache:
    """Keys and values of the tokens so far, per layer ``[batch, kv_heads, length, head_dim]``.
    Storage grows by doubling, from ``STEP`` positions up to ``max_positions``."""

    STEP = 256

    def __init__(self, layers: int, max_positions: int):
        self.length = 0
        self.max_positions = max_positions
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor):
        """Adds the keys and values of new tokens; returns all of the layer's so far (views).

        ``length`` counts the tokens before these until :meth:`advance`.
        """
        end = self.length + keys.shape[2]
        if end > self.max_positions:
            raise ValueError(f"ids: {end} tokens, the model takes at most {self.max_positions}")
        for store, new in ((self._keys, keys), (self._values, values)):
            old = store[layer]
            if old is None or old.shape[2] < end:
                room = min(self.max_positions, max(2 * self.length, -(-end // self.STEP) * self.STEP))
                store[layer] = new.new_empty(*new.shape[:2], room, new.shape[3])
                if old is not None:
                    store[layer][:, :, : self.length] = old[:, :, : self.length]
            store[layer][:, :, self.length : end] = new
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, filled or not."""
        stores = [t for t in (*self._keys, *self._values) if t is not None]
        return sum(t.numel() * t.element_size() for t in stores)


class Rotary(nn.Module):
    """Cosines and sines of the rotary position embedding, ``[positions, head_dim / 2]``, computed
    up to the longest sequence seen."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def _frequencies(self, device) -> torch.Tensor:
        rope, dim = self.config.rope, self.config.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
        frequencies = 1.0 / rope["rope_theta"] ** exponents
        if rope["rope_type"] == "linear":
            frequencies = frequencies / rope["factor"]
        elif rope["rope_type"] == "llama3":
            # Long wavelengths are stretched, short ones kept, those between blended
            # (Llama 3.1, arXiv:2407.21783).
            original = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = original * frequencies / (2 * math.pi)
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
        return frequencies

    def forward(self, start: int, count: int, like: torch.Tensor):
        """cos, sin ``[1, count, 1, head_dim / 2]`` for positions ``start ..``, in like's dtype."""
        if (
            self._tables is None
            or self._tables[0].shape[0] < start + count
            or self._tables[0].device != like.device
        ):
            length = max(1024, 2 * (start + count))
            with torch.inference_mode(False):  # usable with autograd later
                positions = torch.arange(length, device=like.device, dtype=torch.float32)
                angles = positions[:, None] * self._frequencies(like.device)
                self._tables = (angles.cos(), angles.sin())
        cos, sin = (t[None, start : start + count, None] for t in self._tables)
        return cos.to(like.dtype), sin.to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x [batch, length, heads, head_dim]``, halves ``(i, i + head_dim / 2)`` turned."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache: KVCache, layer: int):
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, length, -1, self.head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=2)
        past = cache.length
        keys, values = cache.append(layer, k.transpose(1, 2), v.transpose(1, 2))
        if length == 1:
            # The query heads that share a key-value head stand as its queries: no copy of keys.
            q = q.reshape(batch, self.kv_heads, -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, keys, values)
            return self.o_proj(y.reshape(batch, 1, -1))
        mask = None
        if past:
            positions = torch.arange(past + length, device=x.device)
            mask = positions <= positions[past:, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, mask, is_causal=not past, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache: KVCache, layer: int):
        x = x + self.attention(self.input_norm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_norm(x))


class Decoder(nn.Module):
    """A decoder language model.  ``tokenizer`` is set by :func:`memlm.load`."""

    tokenizer = None

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self) -> KVCache:
        return KVCache(self.config.layers, self.config.max_positions)

    def forward(
        self, ids: torch.Tensor, cache: KVCache | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """Token ids ``[batch, length]`` -> logits ``[batch, length, vocab]`` in f32, or
        ``[batch, 1, vocab]`` of the last position with ``last_only``.

        With a ``cache`` the ids continue what it holds, and are added to it.  Raises ValueError
        for ids that are not a non-empty matrix, or beyond the model's positions.
        """
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"ids: got shape {list(ids.shape)}, expected [batch, length]")
        cache = self.new_cache() if cache is None else cache
        x = self.embed_tokens(ids)
        cos, sin = self.rotary(cache.length, ids.shape[1], x)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache, i)
        cache.advance(ids.shape[1])
        x = self.norm(x[:, -1:] if last_only else x)
        return self.lm_head(x).float()

    def hf_tensors(self) -> dict[str, list[str]]:
        """This model's tensor names -> the Hugging Face tensors they are made of (concatenated
        along the rows where there are several)."""
        names = {
            "embed_tokens.weight": ["model.embed_tokens.weight"],
            "norm.weight": ["model.norm.weight"],
        }
        if not self.config.tied:
            names["lm_head.weight"] = ["lm_head.weight"]
        for i in range(self.config.layers):
            ours, theirs = f"layers.{i}.", f"model.layers.{i}."
            qkv = [f"{theirs}self_attn.{p}_proj" for p in "qkv"]
            for kind in ("weight", "bias") if self.config.qkv_bias else ("weight",):
                names[f"{ours}attention.qkv_proj.{kind}"] = [f"{n}.{kind}" for n in qkv]
            names |= {
                f"{ours}input_norm.weight": [f"{theirs}input_layernorm.weight"],
                f"{ours}attention.o_proj.weight": [f"{theirs}self_attn.o_proj.weight"],
                f"{ours}post_norm.weight": [f"{theirs}post_attention_layernorm.weight"],
                f"{ours}mlp.gate_up_proj.weight": [
                    f"{theirs}mlp.gate_proj.weight",
                    f"{theirs}mlp.up_proj.weight",
                ],
                f"{ours}mlp.down_proj.weight": [f"{theirs}mlp.down_proj.weight"],
            }
        return names
