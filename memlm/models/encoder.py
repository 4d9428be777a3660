"""The reference encoder: the BERT architecture (arXiv:1810.04805), and sentence embeddings by mean
pooling (Sentence-BERT, arXiv:1908.10084)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memlm.errors import FormatError


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    max_positions: int
    token_types: int
    layer_norm_eps: float

    @classmethod
    def from_hf(cls, config: dict) -> EncoderConfig:
        """From Hugging Face's config of a ``bert`` model; FormatError for what is not known."""
        if config.get("model_type") != "bert":
            raise FormatError(f"config: model_type {config.get('model_type')!r}; known is bert")
        if config.get("hidden_act", "gelu") != "gelu":
            raise FormatError(f"config: hidden_act {config['hidden_act']!r}; known is 'gelu'")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise FormatError("config: only absolute position embeddings are known")

        def size(key: str) -> int:
            value = config.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FormatError(f"config: {key} is {value!r}, expected a positive integer")
            return value

        made = cls(
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=size("num_attention_heads"),
            max_positions=size("max_position_embeddings"),
            token_types=size("type_vocab_size"),
            layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        )
        if made.hidden_size % made.heads:
            raise FormatError(f"config: {made.heads} heads do not divide {made.hidden_size}")
        return made


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x, mask):
        batch, length, width = x.shape
        qkv = self.qkv_proj(x).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = self.attention_norm(x + self.o_proj(y.transpose(1, 2).reshape(batch, length, width)))
        return self.mlp_norm(x + self.down_proj(F.gelu(self.up_proj(x))))


class Encoder(nn.Module):
    """A BERT encoder.  ``tokenizer`` is set by :func:`memlm.load`."""

    tokenizer = None

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.embed_types = nn.Embedding(config.token_types, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids ``[batch, length]`` and a ``mask`` of the same shape (True or 1: a token, 0:
        padding) -> hidden states ``[batch, length, hidden]``.

        Raises ValueError for shapes that do not fit, or more tokens than the model has positions.
        """
        if ids.dim() != 2 or ids.numel() == 0 or ids.shape[1] > self.config.max_positions:
            raise ValueError(
                f"ids: got shape {list(ids.shape)}, expected [batch, length] with length up to "
                f"{self.config.max_positions}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"mask: got shape {list(mask.shape)}, expected {list(ids.shape)}")
        positions = torch.arange(ids.shape[1], device=ids.device)
        types = torch.zeros(1, dtype=torch.int64, device=ids.device)
        # The order of additions is Hugging Face's, to the last bit.
        x = self.embed_tokens(ids) + self.embed_types(types) + self.embed_positions(positions)
        x = self.embed_norm(x)
        attend = None if mask is None else mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, attend)
        return x

    @torch.inference_mode()
    def embed(self, texts: list[str], max_tokens: int = 256) -> torch.Tensor:
        """Unit vectors ``[len(texts), hidden]``: the mean over each text's tokens, normalised.
        Texts beyond ``max_tokens`` tokens (special ones included) are cut."""
        if isinstance(texts, str) or not texts:
            raise ValueError("texts: expected a non-empty list of strings")
        backend = self.tokenizer.backend
        limit = min(max_tokens, self.config.max_positions)
        encoded = [e.ids[: limit - 1] + e.ids[-1:] if len(e.ids) > limit else e.ids
                   for e in backend.encode_batch(texts)]  # fmt: skip
        length = max(map(len, encoded))
        ids = torch.tensor([e + [0] * (length - len(e)) for e in encoded])
        mask = torch.tensor([[1] * len(e) + [0] * (length - len(e)) for e in encoded])
        weights = mask[..., None].float()
        hidden = self(ids, mask).float()
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    def hf_tensors(self) -> dict[str, list[str]]:
        """This model's tensor names -> the Hugging Face tensors they are made of."""
        names = {
            "embed_tokens.weight": ["embeddings.word_embeddings.weight"],
            "embed_positions.weight": ["embeddings.position_embeddings.weight"],
            "embed_types.weight": ["embeddings.token_type_embeddings.weight"],
        }
        modules = {"embed_norm": ["embeddings.LayerNorm"]}
        for i in range(self.config.layers):
            ours, theirs = f"layers.{i}.", f"encoder.layer.{i}."
            modules |= {
                f"{ours}qkv_proj": [
                    f"{theirs}attention.self.{part}" for part in ("query", "key", "value")
                ],
                f"{ours}o_proj": [f"{theirs}attention.output.dense"],
                f"{ours}attention_norm": [f"{theirs}attention.output.LayerNorm"],
                f"{ours}up_proj": [f"{theirs}intermediate.dense"],
                f"{ours}down_proj": [f"{theirs}output.dense"],
                f"{ours}mlp_norm": [f"{theirs}output.LayerNorm"],
            }
        for module, sources in modules.items():
            for kind in ("weight", "bias"):
                names[f"{module}.{kind}"] = [f"{source}.{kind}" for source in sources]
        return names
