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
from memlm.kv_cache import PagedKVCache, Step
from memlm.layers import Embedding, Linear
from memlm.layers.native import LINEARS, LayerParts, NativeLayers, Watch, can_run, is_plain
from memlm.models.config import MAX_LAYERS, integer, number
from memlm.ops import attention


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.  ``rope`` is Hugging Face's rope parameters (``rope_type`` and so on)."""

    MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
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
    qk_norm: bool = False  # RMSNorm of each head of queries and keys
    # Of each layer, how many tokens a query sees, itself included; 0: all before it.
    windows: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: dict) -> DecoderConfig:
        """From Hugging Face's config of a ``llama``, ``mistral``, ``qwen2`` or ``qwen3`` model.

        Raises FormatError for what this decoder does not compute.
        """
        kind = config.get("model_type")
        if kind not in cls.MODEL_TYPES:
            known = ", ".join(cls.MODEL_TYPES)
            raise FormatError(f"config: model_type {kind!r}; known are {known}")
        if config.get("hidden_act", "silu") != "silu":
            raise FormatError(f"config: hidden_act {config['hidden_act']!r}; known is 'silu'")
        biased = kind in ("llama", "qwen3") and config.get("attention_bias")
        if config.get("mlp_bias") or biased:
            raise FormatError("config: biases beyond those of query, key and value are not known")
        heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
        made = cls(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(config, "intermediate_size"),
            layers=integer(config, "num_hidden_layers", most=MAX_LAYERS),
            heads=heads,
            kv_heads=integer(config, "num_key_value_heads", heads),
            head_dim=integer(config, "head_dim", 128 if kind == "qwen3" else hidden // heads),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=cls._rope(config),
            max_positions=integer(config, "max_position_embeddings", 2048),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            windows=cls._windows(config),
        )
        if made.heads % made.kv_heads or made.head_dim % 2:
            raise FormatError(
                f"config: {made.heads} heads over {made.kv_heads} key-value heads of size "
                f"{made.head_dim} do not divide evenly"
            )
        return made

    @staticmethod
    def _windows(config: dict) -> tuple[int, ...]:
        """The window of each layer, by Hugging Face's rules; of none with one: ()."""
        layers = integer(config, "num_hidden_layers", most=MAX_LAYERS)
        if config["model_type"] == "mistral":
            used, first = config.get("sliding_window") is not None, 0
        else:
            used = bool(config.get("use_sliding_window"))
            first = config.get("max_window_layers", 28)
        if not used:
            return ()
        if not isinstance(first, int):
            raise FormatError(f"config: max_window_layers is {first!r}, expected an integer")
        window = integer(config, "sliding_window", 4096)
        kinds = config.get("layer_types")
        if kinds is None:
            return tuple(window if i >= first else 0 for i in range(layers))
        known = {"full_attention": 0, "sliding_attention": window}
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or not all(isinstance(kind, str) and kind in known for kind in kinds)
        ):
            raise FormatError(
                f"config: layer_types {kinds!r}; expected {layers} of {', '.join(known)}"
            )
        return tuple(known[kind] for kind in kinds)

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


class Rotary(nn.Module):
    """The angles of the rotary position embedding, computed up to the longest sequence seen:
    ``[positions, 3, head_dim / 2]`` f32, the sine with minus, the sine, the cosine."""

    # Positions computed at first: enough for most texts, and 384 KB for heads of 64.
    FIRST = 1024

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self._table: torch.Tensor | None = None

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

    def table(self, end: int, device: torch.device) -> torch.Tensor:
        """The angles of at least the positions ``0 .. end - 1``."""
        table = self._table
        if table is None or len(table) < end or table.device != device:
            length = min(self.config.max_positions, max(self.FIRST, 2 * end))
            with torch.inference_mode(False):  # usable with autograd later
                positions = torch.arange(length, device=device, dtype=torch.float32)
                angles = positions[:, None] * self._frequencies(device)
                sin = angles.sin()
                table = self._table = torch.stack((-sin, sin, angles.cos()), dim=1)
        return table


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """``x [..., length, heads, head_dim]``, each pair ``(i, i + head_dim / 2)`` turned:
    ``(a, b) -> (a cos - b sin, b cos + a sin)``; ``angles [length, 3, head_dim / 2]`` as
    :class:`Rotary` has them."""
    halves = x.view(*x.shape[:-1], 2, -1)
    angles = angles.to(x.dtype)[:, None]
    sines, cosines = angles[..., :2, :], angles[..., 2:, :]
    return torch.addcmul(halves * cosines, halves.flip(-2), sines).view(x.shape)


def linear(layer: nn.Module, x, norm=None, swiglu: bool = False, residual=None):
    """``f(layer(norm(x))) + residual``, where norm is RMSNorm and f SwiGLU's gate: one operation
    where the layer is packed and the norm is just that, several of torch's otherwise."""
    fits = not swiglu or layer.out_features % (2 * TILE_ROWS) == 0
    if isinstance(layer, Linear) and fits and (norm is None or is_plain(norm, nn.RMSNorm)):
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
        self.window = config.windows[layer] if config.windows else 0
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        for name in ("q_norm", "k_norm"):
            norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
            self.register_module(name, norm)

    def forward(self, x, norm, angles, cache: PagedKVCache | None = None, step: Step | None = None):
        """``x [batch, length, hidden]``; with a ``cache`` one batch entry, the new tokens of all of
        the step's sequences."""
        batch, length, _ = x.shape
        rotated = self.heads + self.kv_heads
        qkv = linear(self.qkv_proj, x, norm).view(batch, length, -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is None:
            q, k = rotate(qkv[:, :, :rotated], angles).split((self.heads, self.kv_heads), dim=2)
        else:
            q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)
        if cache is None:
            y = self._dense(q, k, v)
        else:
            y = cache.attend(step, self.layer, q[0], k[0], v[0], window=self.window)
        return linear(self.o_proj, y.reshape(batch, length, -1), residual=x)

    def _dense(self, q, k, v):
        """Causal attention of whole sequences, ``[batch, length, heads, head_dim]``."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        window = self.window or None
        return attention(q, k, v, is_causal=True, enable_gqa=True, window=window).transpose(1, 2)


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

    def forward(self, x, angles, cache: PagedKVCache | None = None, step: Step | None = None):
        x = self.attention(x, self.input_norm, angles, cache, step)
        return self.mlp(x, self.post_norm)

    def parts(self) -> LayerParts | None:
        """What the library needs to run this layer in its place; None where a module is not
        what it was built as, or calls something besides."""
        own, attention, mlp = self._modules, self._modules["attention"], self._modules["mlp"]
        if not (is_plain(self, Layer) and is_plain(attention, Attention) and is_plain(mlp, MLP)):
            return None
        inner, outer = attention._modules, mlp._modules
        linears = (inner["qkv_proj"], inner["o_proj"], outer["gate_up_proj"], outer["down_proj"])
        norms = [own["input_norm"], own["post_norm"], inner["q_norm"], inner["k_norm"]]
        if not all(is_plain(module, *LINEARS) for module in linears):
            return None
        if not all(norm is None or is_plain(norm, nn.RMSNorm) for norm in norms):
            return None
        if len({norm.eps for norm in norms if norm is not None}) > 1:
            return None
        weights = [None if norm is None else norm._parameters["weight"] for norm in norms]
        return LayerParts(*weights, norms[0].eps, *linears, attention.window)


class Decoder(nn.Module):
    """A decoder language model.  ``tokenizer`` is set by :func:`memlm.load`, where there is one."""

    tokenizer = None
    # What a checkpoint may hold and this model computes itself.
    hf_ignored = re.compile(r".*\.rotary_emb\.inv_freq")
    # New tokens that go through the layers at a time, with a cache: what bounds the memory of
    # activations.  512 of SmolLM2 in 4 bits by 64 take 1.17 times as long as at once, by 128 1.07,
    # by 256 1.02.
    CHUNK = 512

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
        self._native: tuple[NativeLayers, Watch] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_native": None}  # addresses are of this process

    def new_cache(self, kv: str | None = None, **settings) -> PagedKVCache:
        """A cache for this model's keys and values, stored as ``kv``: f32, bf16, int8 or int4;
        None: as they are (of an f16 model f32).  ``settings`` as
        :class:`memlm.kv_cache.PagedKVCache` has them.  Where all layers have a window it holds no
        more than the widest needs."""
        c, weight = self.config, self.norm.weight
        if kv is None:
            kv = "bf16" if weight.dtype == torch.bfloat16 else "f32"
        window = max(c.windows) if c.windows and all(c.windows) else None
        return PagedKVCache(
            c.layers, c.kv_heads, c.head_dim, kv, window=window, device=weight.device, **settings
        )

    def forward(
        self, ids: torch.Tensor, cache: PagedKVCache | None = None, last_only: bool = False
    ) -> torch.Tensor:
        """Token ids ``[batch, length]`` -> logits ``[batch, length, vocab]`` in f32, or
        ``[batch, 1, vocab]`` of the last position with ``last_only``.

        With a ``cache`` row i of ids continues its i-th sequence, and is added to it; an empty
        cache is given sequences.  The tokens go through the layers ``CHUNK`` at a time.  Raises
        ValueError for ids that are not a non-empty matrix, of another number of rows than the cache
        has sequences, or that go beyond the model's positions; OutOfBlocks where the cache has no
        room.
        """
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"ids: got shape {list(ids.shape)}, expected [batch, length]")
        batch, length = ids.shape
        held = () if cache is None else cache.sequences
        if held and len(held) != batch:
            raise ValueError(f"ids: a batch of {batch}, the cache holds {len(held)}")
        end = length + max((cache.length(sequence) for sequence in held), default=0)
        if end > self.config.max_positions:
            raise ValueError(f"ids: {end} tokens, the model takes {self.config.max_positions}")
        if cache is None:
            x = self.hidden(ids)
            return self.logits(x[:, -1:] if last_only else x)
        sequences = held or [cache.add() for _ in range(batch)]
        logits = []
        for part in ids.split(max(1, self.CHUNK // batch), dim=1):
            step = cache.begin_step(dict.fromkeys(sequences, part.shape[1]))
            x = self.run(part.reshape(-1), cache, step).view(*part.shape, -1)
            cache.commit(step)
            if not last_only:
                logits.append(self.logits(x))
        return self.logits(x[:, -1:]) if last_only else torch.cat(logits, dim=1)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Whole sequences ``[batch, length]`` through all layers, without a cache: ``[batch, length,
        hidden]``, of which :meth:`logits` are made."""
        x, length = self.embed_tokens(ids), ids.shape[1]
        angles = self.rotary.table(length, ids.device)[:length]
        for layer in self.layers:
            x = layer(x, angles)
        return x

    def run(self, ids: torch.Tensor, cache: PagedKVCache, step: Step) -> torch.Tensor:
        """New tokens ``ids [rows]`` of the step's sequences, one after the other, through all
        layers: ``[rows, hidden]``.  One call of the library where the layers are packed and
        plain."""
        x = self.embed_tokens(ids)
        end = max(cache.length(s) + count for s, count in zip(step.sequences, step.counts))
        angles = self.rotary.table(end, x.device)
        native = self._native_layers(x)
        if native is not None:
            x = x.contiguous()
            native.run(x, cache, step, angles)
            return x
        x, angles = x[None], angles[step.positions]
        for layer in self.layers:
            x = layer(x, angles, cache, step)
        return x[0]

    def _native_layers(self, x: torch.Tensor) -> NativeLayers | None:
        """All layers as one call, where that computes what calling them would."""
        embed = self.embed_tokens  # whose result is x, which the call overwrites
        if not can_run(x) or not is_plain(embed, nn.Embedding, Embedding):
            return None
        if self._native is None or not self._native[1].unchanged():
            self._native = None
            parts = []
            for layer in self.layers:
                parts.append(layer.parts())
                if parts[-1] is None:
                    return None
            try:
                self._native = NativeLayers(parts), Watch([self.layers])
            except ValueError:
                return None
        native = self._native[0]
        return native if native.dtype == x.dtype else None

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., hidden]``, what the layers made of a token -> logits ``[..., vocab]`` in
        f32."""
        return linear(self.lm_head, x, self.norm).float()

    def top(self, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` largest of :meth:`logits`, largest first, and their ids, both ``[..., k]``;
        where the head is packed, without storing the others (:func:`memlm.ops.matmul_topk`)."""
        head, norm = self.lm_head, self.norm
        if is_plain(head, Linear) and is_plain(norm, nn.RMSNorm):
            return head.topk(x, k, norm.weight, norm.eps)
        return self.logits(x).topk(k)

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
            for part in ("q_norm", "k_norm") if config.qk_norm else ():
                source = f"{theirs}.self_attn.{part}.weight"
                tensors[f"{ours}.attention.{part}.weight"] = {source: config.head_dim}
            for mine, source in (
                ("input_norm", "input_layernorm"),
                ("attention.o_proj", "self_attn.o_proj"),
                ("post_norm", "post_attention_layernorm"),
                ("mlp.down_proj", "mlp.down_proj"),
            ):
                tensors[f"{ours}.{mine}.weight"] = {f"{theirs}.{source}.weight": width}
        return tensors
