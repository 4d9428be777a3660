"""The reference decoder: rotary positions, grouped-query attention, RMSNorm, SwiGLU (the Llama
architecture, arXiv:2302.13971; GQA arXiv:2305.13245; RoPE arXiv:2104.09864; SwiGLU
arXiv:2002.05202).

Query, key and value are one linear layer, and so are gate and up: fewer, larger matmuls.  Linear
layers and embeddings are plain torch modules until :func:`memlm.quantize_` replaces them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memlm.errors import FormatError
from memlm.formats import TILE_ROWS
from memlm.layers import Linear
from memlm.models.config import MAX_LAYERS, integer, number


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.  ``rope`` is Hugging Face's rope parameters (``rope_type`` and so on)."""

    MODEL_TYPES = ("llama", "mistral", "qwen2")
    ROPE_TYPES = {  # rope_type -> the numbers it needs besides rope_theta
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }

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
        if kind not in cls.MODEL_TYPES:
            known = ", ".join(cls.MODEL_TYPES)
            raise FormatError(f"config: model_type {kind!r}; known are {known}")
        if config.get("hidden_act", "silu") != "silu":
            raise FormatError(f"config: hidden_act {config['hidden_act']!r}; known is 'silu'")
        if config.get("mlp_bias") or (kind == "llama" and config.get("attention_bias")):
            raise FormatError("config: biases beyond those of query, key and value are not known")
        windowed = config.get("use_sliding_window")
        if windowed or (kind == "mistral" and config.get("sliding_window") is not None):
            raise FormatError("config: sliding-window attention is not known")
        heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
        made = cls(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(config, "intermediate_size"),
            layers=integer(config, "num_hidden_layers", most=MAX_LAYERS),
            heads=heads,
            kv_heads=integer(config, "num_key_value_heads", heads),
            head_dim=integer(config, "head_dim", hidden // heads),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=cls._rope(config),
            max_positions=integer(config, "max_position_embeddings", 2048),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
        )
        if made.heads % made.kv_heads or made.head_dim % 2:
            raise FormatError(
                f"config: {made.heads} heads over {made.kv_heads} key-value heads of size "
                f"{made.head_dim} do not divide evenly"
            )
        return made

    @classmethod
    def _rope(cls, config: dict) -> dict:
        """The rope parameters, wherever this version of the config keeps them, checked."""
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise FormatError(f"config: rope parameters {given!r} are not one flat object")
        merged = {**config, **given}
        kind = given.get("rope_type") or given.get("type") or "default"
        if not isinstance(kind, str) or kind not in cls.ROPE_TYPES:
            known = ", ".join(cls.ROPE_TYPES)
            raise FormatError(f"config: rope_type {kind!r}; known are {known}")
        if merged.get("partial_rotary_factor", 1) != 1:
            raise FormatError("config: partial_rotary_factor: only whole heads are rotated here")
        rope = {key: number(given, key) for key in cls.ROPE_TYPES[kind]}
        if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise FormatError("config: low_freq_factor must be below high_freq_factor")
        return {"rope_type": kind, "rope_theta": number(merged, "rope_theta", 10000.0), **rope}


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

        ``length`` counts the tokens before these until :meth:`advance`.  Raises ValueError for
        another batch size than before.
        """
        end = self.length + keys.shape[2]
        for stores, new in ((self._keys, keys), (self._values, values)):
            if not self._has_room(stores[layer], new, end):
                # All layers now: later, each would take the place that a freed activation left, and
                # the next activation would find none.  Old stores go one by one.
                for i in range(len(stores)):
                    stores[i] = self._grown(stores[i], new, end)
            stores[layer][:, :, self.length : end] = new
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    @staticmethod
    def _has_room(store: torch.Tensor | None, new: torch.Tensor, end: int) -> bool:
        return store is not None and store.shape[2] >= end and store.shape[0] == new.shape[0]

    def _grown(self, old: torch.Tensor | None, new: torch.Tensor, end: int) -> torch.Tensor:
        if old is not None and old.shape[0] != new.shape[0]:
            raise ValueError(f"ids: a batch of {new.shape[0]}, the cache holds {old.shape[0]}")
        steps = -(-end // self.STEP) * self.STEP
        room = min(self.max_positions, max(2 * self.length, steps))
        grown = new.new_empty(*new.shape[:2], room, new.shape[3])
        if old is not None:
            grown[:, :, : self.length] = old[:, :, : self.length]
        return grown

    def advance(self, tokens: int) -> None:
        """Counts the tokens that every layer has appended."""
        self.length += tokens

    def tensors(self) -> list[torch.Tensor]:
        """The storage: keys and values of all layers so far, filled or not."""
        return [t for t in (*self._keys, *self._values) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, filled or not."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class Rotary(nn.Module):
    """The angles of the rotary position embedding, computed up to the longest sequence seen:
    cos ``[positions, 1, 1, head_dim / 2]`` and sin ``[positions, 1, 2, head_dim / 2]``, the latter
    once with each sign, as :func:`rotate` needs them."""

    # Positions computed at first: enough for most texts, and 256 KB for heads of 64.
    FIRST = 1024

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def _frequencies(self, device: torch.device) -> torch.Tensor:
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
        """cos and sin of positions ``start .. start + count - 1``, in like's dtype."""
        end = start + count
        tables = self._tables
        if tables is None or tables[0].shape[0] < end or tables[0].device != like.device:
            length = min(self.config.max_positions, max(self.FIRST, 2 * end))
            with torch.inference_mode(False):  # usable with autograd later
                positions = torch.arange(length, device=like.device, dtype=torch.float32)
                angles = positions[:, None, None, None] * self._frequencies(like.device)
                sin = angles.sin()
                tables = self._tables = (angles.cos(), torch.cat((-sin, sin), dim=-2))
        return tables[0][start:end].to(like.dtype), tables[1][start:end].to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x [batch, length, heads, head_dim]``, each pair ``(i, i + head_dim / 2)`` turned:
    ``(a, b) -> (a cos - b sin, b cos + a sin)``."""
    halves = x.view(*x.shape[:-1], 2, -1)
    return torch.addcmul(halves * cos, halves.flip(-2), sin).view(x.shape)


def _is_plain(norm: nn.Module) -> bool:
    """Whether calling it computes RMSNorm and nothing else."""
    return type(norm) is nn.RMSNorm and not (norm._forward_hooks or norm._forward_pre_hooks)


def linear(layer: nn.Module, x, norm=None, swiglu: bool = False, residual=None):
    """``f(layer(norm(x))) + residual``, where norm is RMSNorm and f SwiGLU's gate: one operation
    where the layer is packed and the norm is just that, several of torch's otherwise."""
    fits = not swiglu or layer.out_features % (2 * TILE_ROWS) == 0
    if isinstance(layer, Linear) and fits and (norm is None or _is_plain(norm)):
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return layer(x, weight, eps, swiglu, residual)
    if norm is not None:
        x = norm(x)
    y = layer(x)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


class Attention(nn.Module):
    """``x + attention(norm(x))``."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, norm, cos, sin, mask=None, cache: KVCache | None = None):
        batch, length, _ = x.shape
        rotated = self.heads + self.kv_heads
        qkv = linear(self.qkv_proj, x, norm).view(batch, length, -1, self.head_dim)
        qk = rotate(qkv[:, :, :rotated], cos, sin)
        q = qk[:, :, : self.heads]
        k, v = qk[:, :, self.heads :].transpose(1, 2), qkv[:, :, rotated:].transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if length == 1:
            # The query heads that share a key-value head stand as its queries: the cache is read
            # once for all of them.
            q = q.reshape(batch, self.kv_heads, -1, self.head_dim)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, mask, is_causal=mask is None, enable_gqa=True
            ).transpose(1, 2)
        return linear(self.o_proj, y.reshape(batch, length, -1), residual=x)


class MLP(nn.Module):
    """``x + mlp(norm(x))``, the mlp being SwiGLU's."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x, norm):
        gated = linear(self.gate_up_proj, x, norm, swiglu=True)
        return linear(self.down_proj, gated, residual=x)


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.post_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask=None, cache: KVCache | None = None):
        x = self.attention(x, self.input_norm, cos, sin, mask, cache)
        return self.mlp(x, self.post_norm)


class Decoder(nn.Module):
    """A decoder language model.  ``tokenizer`` is set by :func:`memlm.load`, where there is one."""

    tokenizer = None
    # What a checkpoint may hold and this model computes itself.
    hf_ignored = re.compile(r".*\.rotary_emb\.inv_freq")

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
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
        for ids that are not a non-empty matrix, or that go beyond the model's positions.
        """
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"ids: got shape {list(ids.shape)}, expected [batch, length]")
        past, length = cache.length if cache is not None else 0, ids.shape[1]
        if past + length > self.config.max_positions:
            raise ValueError(
                f"ids: {past + length} tokens, the model takes {self.config.max_positions}"
            )
        x = self.embed_tokens(ids)
        cos, sin = self.rotary(past, length, x)
        mask = None  # plainly causal, or one token that sees everything
        if past and length > 1:
            positions = torch.arange(past + length, device=x.device)
            mask = positions <= positions[past:, None]
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.advance(length)
        x = x[:, -1:] if last_only else x
        return linear(self.lm_head, x, self.norm).float()

    def hf_tensors(self) -> dict[str, dict[str, int]]:
        """This model's tensor names -> the Hugging Face tensors they are made of and the rows of
        each (one below the other where there are several)."""
        config = self.config
        width, inner = config.hidden_size, config.intermediate_size
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        tensors = {
            "embed_tokens.weight": {"model.embed_tokens.weight": config.vocab_size},
            "norm.weight": {"model.norm.weight": width},
        }
        if not config.tied:
            tensors["lm_head.weight"] = {"lm_head.weight": config.vocab_size}
        for i in range(config.layers):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
                tensors[f"{ours}.attention.qkv_proj.{kind}"] = {
                    f"{theirs}.self_attn.{part}_proj.{kind}": rows
                    for part, rows in (("q", q), ("k", kv), ("v", kv))
                }
            tensors[f"{ours}.mlp.gate_up_proj.weight"] = {
                f"{theirs}.mlp.{part}_proj.weight": inner for part in ("gate", "up")
            }
            for mine, source in (
                ("input_norm", "input_layernorm"),
                ("attention.o_proj", "self_attn.o_proj"),
                ("post_norm", "post_attention_layernorm"),
                ("mlp.down_proj", "mlp.down_proj"),
            ):
                tensors[f"{ours}.{mine}.weight"] = {f"{theirs}.{source}.weight": width}
        return tensors
