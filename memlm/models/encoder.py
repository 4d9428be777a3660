"""The reference encoder: the BERT architecture (arXiv:1810.04805), and sentence embeddings by mean
pooling (Sentence-BERT, arXiv:1908.10084)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memlm.errors import FormatError
from memlm.models.config import MAX_LAYERS, integer, number


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder.  ``head_dim`` is memlm's own key in a config: heads that were taken out
    (:func:`memlm.prune.remove_`) leave the others as large as they were."""

    MODEL_TYPES = ("bert",)

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    head_dim: int
    max_positions: int
    token_types: int
    layer_norm_eps: float

    @classmethod
    def from_hf(cls, config: dict) -> EncoderConfig:
        """From Hugging Face's config of a ``bert`` model; FormatError for what is not known."""
        if config.get("model_type") not in cls.MODEL_TYPES:
            raise FormatError(f"config: model_type {config.get('model_type')!r}; known is bert")
        if config.get("hidden_act", "gelu") != "gelu":
            raise FormatError(f"config: hidden_act {config['hidden_act']!r}; known is 'gelu'")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise FormatError("config: only absolute position embeddings are known")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise FormatError("config: is_decoder: only BERT encoders are known")
        heads, hidden = integer(config, "num_attention_heads"), integer(config, "hidden_size")
        if config.get("head_dim") is None and hidden % heads:
            raise FormatError(f"config: {heads} heads do not divide {hidden}")
        return cls(
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(config, "intermediate_size"),
            layers=integer(config, "num_hidden_layers", most=MAX_LAYERS),
            heads=heads,
            head_dim=integer(config, "head_dim", hidden // heads),
            max_positions=integer(config, "max_position_embeddings"),
            token_types=integer(config, "type_vocab_size"),
            layer_norm_eps=number(config, "layer_norm_eps", 1e-12),
        )


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.qkv_proj = nn.Linear(width, 3 * inner)
        self.o_proj = nn.Linear(inner, width)
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x, mask):
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = self.attention_norm(x + self.o_proj(y.transpose(1, 2).reshape(batch, length, -1)))
        return self.mlp_norm(x + self.down_proj(F.gelu(self.up_proj(x))))


class Encoder(nn.Module):
    """A BERT encoder.  ``tokenizer`` is set by :func:`memlm.load`, where there is one."""

    tokenizer = None
    # What a checkpoint may hold besides the encoder: buffers, the pooler, heads for other tasks.
    hf_ignored = re.compile(r"(embeddings\.position_ids|(pooler|cls|classifier|qa_outputs)\..*)")

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.embed_types = nn.Embedding(config.token_types, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids ``[batch, length]``, a ``mask`` of the same shape (True or 1: a token, 0:
        padding; None: all are tokens) and token ``types`` of the same shape (None: all 0) ->
        hidden states ``[batch, length, hidden]``.

        Raises ValueError for shapes that do not fit, or more tokens than the model has positions.
        """
        if ids.dim() != 2 or ids.numel() == 0 or ids.shape[1] > self.config.max_positions:
            raise ValueError(
                f"ids: got shape {list(ids.shape)}, expected [batch, length] with length up to "
                f"{self.config.max_positions}"
            )
        for name, tensor in (("mask", mask), ("types", types)):
            if tensor is not None and tensor.shape != ids.shape:
                raise ValueError(
                    f"{name}: got shape {list(tensor.shape)}, expected {list(ids.shape)}"
                )
        positions = torch.arange(ids.shape[1], device=ids.device)
        types = ids.new_zeros(1) if types is None else types
        # The order of additions is Hugging Face's, to the last bit.
        x = self.embed_tokens(ids) + self.embed_types(types) + self.embed_positions(positions)
        x = self.embed_norm(x)
        attend = None if mask is None else mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, attend)
        return x

    @torch.inference_mode()
    def embed(self, texts: list[str], max_tokens: int = 256, batch: int = 32) -> torch.Tensor:
        """Unit vectors ``[len(texts), hidden]`` in f32: the mean over each text's tokens,
        normalised.  Texts beyond ``max_tokens`` tokens (special ones included) are cut.  Texts of
        similar length are computed together, ``batch`` at a time.

        Raises ValueError for no texts, an argument out of range, or a model without tokenizer.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError("texts: expected a non-empty list of strings")
        # Two special tokens are always kept: the first and the last.
        if max_tokens < 3 or batch < 1:
            raise ValueError(f"max_tokens, batch: got {max_tokens}, {batch}; at least 3 and 1")
        if self.tokenizer is None:
            raise ValueError("texts: this model was loaded from a folder without tokenizer.json")
        limit = min(max_tokens, self.config.max_positions)
        rows = self.tokenizer.encode_batch(texts)
        rows = [row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        device = self.embed_norm.weight.device
        vectors = torch.empty(len(rows), self.config.hidden_size, device=device)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tokens = [torch.tensor(rows[i]) for i in chosen]
            ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)
            lengths = torch.tensor([len(row) for row in tokens], device=device)[:, None]
            mask = torch.arange(ids.shape[1], device=device) < lengths
            total = (self(ids, mask).float() * mask[..., None]).sum(1)
            vectors[chosen] = F.normalize(total / lengths, dim=-1)
        return vectors

    def hf_tensors(self) -> dict[str, dict[str, int]]:
        """This model's tensor names -> the Hugging Face tensors they are made of and the rows of
        each (one below the other where there are several)."""
        config = self.config
        width, inner = config.hidden_size, config.intermediate_size
        rows = config.heads * config.head_dim
        tensors = {
            "embed_tokens.weight": {"embeddings.word_embeddings.weight": config.vocab_size},
            "embed_positions.weight": {
                "embeddings.position_embeddings.weight": config.max_positions
            },
            "embed_types.weight": {"embeddings.token_type_embeddings.weight": config.token_types},
        }
        modules = {"embed_norm": {"embeddings.LayerNorm": width}}
        for i in range(config.layers):
            ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
            modules |= {
                f"{ours}.qkv_proj": {
                    f"{theirs}.attention.self.{part}": rows for part in ("query", "key", "value")
                },
                f"{ours}.o_proj": {f"{theirs}.attention.output.dense": width},
                f"{ours}.attention_norm": {f"{theirs}.attention.output.LayerNorm": width},
                f"{ours}.up_proj": {f"{theirs}.intermediate.dense": inner},
                f"{ours}.down_proj": {f"{theirs}.output.dense": width},
                f"{ours}.mlp_norm": {f"{theirs}.output.LayerNorm": width},
            }
        for module, sources in modules.items():
            for kind in ("weight", "bias"):
                tensors[f"{module}.{kind}"] = {f"{s}.{kind}": rows for s, rows in sources.items()}
        return tensors
