"""The work whose memory :mod:`memlm.plan` predicts, in plain torch: a prompt and its continuation
through a KV cache, one encoder batch, or training steps."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from memlm import memory
from memlm.convert import QuantConfig, quantize_
from memlm.kv_cache import PagedKVCache
from memlm.layers import Linear
from memlm.models.decoder import Decoder
from memlm.models.encoder import Encoder
from memlm.models.load import build
from memlm.optim import AdamW8bit
from memlm.plan import Settings

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": AdamW8bit,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}


class LoRA(nn.Module):
    """``layer(x) + B A x`` with ``A [rank, in]``, ``B [out, rank]`` (arXiv:2106.09685)."""

    def __init__(self, layer: nn.Module, rank: int, dtype: torch.dtype):
        super().__init__()
        self.layer, self.out_features = layer, layer.out_features
        self.a = nn.Linear(layer.in_features, rank, bias=False, dtype=dtype)
        self.b = nn.Linear(rank, layer.out_features, bias=False, dtype=dtype)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.b(self.a(x))


def add_adapters_(model: nn.Module, rank: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Freezes the model and puts a :class:`LoRA` around every linear layer inside its layers."""
    model.requires_grad_(False)
    for layer in model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.Linear, Linear)):
                    setattr(parent, name, LoRA(child, rank, dtype))
    return model


def checkpoint_(model: nn.Module) -> nn.Module:
    """Lets every layer keep its input only, and compute the rest again for its gradient
    (arXiv:1604.06174)."""
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(
            forward, *args, use_reentrant=False
        )
    return model


@torch.inference_mode()
def infer(model: Decoder | Encoder, batch: int, context: int, prompt: int) -> PagedKVCache | None:
    """Decoders: ``prompt`` tokens at once, the others up to ``context`` one by one; returns the
    cache.  Encoders: ``context`` tokens."""
    # Any tokens do: the work does not depend on them.
    ids = torch.zeros(batch, context, dtype=torch.int64)
    if isinstance(model, Encoder):
        model(ids)
        return None
    cache = model.new_cache()
    model(ids[:, :prompt], cache, last_only=True)
    for _ in range(prompt, context):
        model(ids[:, :1], cache, last_only=True)
    return cache


def loss(model: Decoder | Encoder, ids: torch.Tensor) -> torch.Tensor:
    """Decoders: the cross entropy of every next token.  Encoders: that of finding each row's
    vector among the other rows' (in-batch contrast, arXiv:1807.03748)."""
    if isinstance(model, Decoder):
        labels = ids.roll(-1, dims=1)
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    vectors = F.normalize(model(ids).mean(1), dim=-1)
    return F.cross_entropy(vectors @ vectors.T, torch.arange(len(ids)))


def train(
    model: Decoder | Encoder, batch: int, context: int, optimizer: str, steps: int = 2
) -> torch.optim.Optimizer:
    """Training steps on the parameters that require gradients; from the second on they are alike.
    Returns the optimizer; the last gradients stay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = OPTIMIZERS[optimizer](trained)
    ids = torch.randint(model.config.vocab_size, (batch, context))
    model.train()
    for _ in range(steps):
        stepper.zero_grad()
        loss(model, ids).backward()
        stepper.step()
    return stepper


def prepare_(model: nn.Module, settings: Settings) -> nn.Module:
    """Adapters and checkpointing as the settings have them."""
    if settings.train == "lora":
        add_adapters_(model, settings.rank, settings.floats)
    if settings.train and settings.checkpoint:
        checkpoint_(model)
    return model


def run(model: nn.Module, settings: Settings) -> PagedKVCache | torch.optim.Optimizer | None:
    """The work of the settings on a prepared model; returns what is kept after it."""
    s = settings
    if s.train:
        return train(model, s.batch, s.context, s.optimizer)
    return infer(model, s.batch, s.context, s.prompt or s.context)


TINY = {
    "decoder": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "encoder": {"model_type": "bert", "type_vocab_size": 2},
}
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
# m, k, n of a product for which the packing buffers that MKL keeps reach their size, 12 MB for a
# thread: larger ones were found to add nothing.
FULL = (2048, 1024, 4096)


def quantization(settings: Settings) -> QuantConfig:
    """How the settings pack a model."""
    embedding = None if settings.embedding == "float" else settings.embedding
    return QuantConfig(settings.format, embedding, embedding)


def zeros_(model: nn.Module) -> None:
    """Zeros that every pattern leaves out: half of the rows of each matrix inside the layers, and
    every second column."""
    for parameter in model.layers.parameters():
        if parameter.dim() == 2:
            parameter.data[: len(parameter) // 2] = 0
            parameter.data[:, ::2] = 0


def warm_up(kind: str, settings: Settings) -> None:
    """The same work on a tiny model of the same ``kind`` (of TINY), of which nothing stays but what
    the libraries keep: pages of code that were read, buffers, imported modules."""
    model = build({**SIZES, **TINY[kind]}).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model = model.to(settings.floats)
    if "/" in settings.format:
        zeros_(model)
    if settings.packed:
        quantize_(model, quantization(settings))
    run(prepare_(model, settings), replace(settings, batch=2, context=64, prompt=None))
    if settings.train or not settings.packed:  # otherwise nothing is multiplied by them
        m, k, n = FULL
        x, w = (torch.ones(rows, k, dtype=settings.floats) for rows in (m, n))
        F.linear(x, w)


def base(kind: str, settings: str) -> int:
    """Resident bytes of this process after :func:`warm_up` with settings in JSON."""
    memory.return_freed()
    warm_up(kind, Settings(**json.loads(settings)))
    gc.collect()
    return memory.resident_bytes()
