"""What can be taken out of the models that :mod:`memlm.prune.structured` knows, where it stands,
and what the config says of the rest.

Heads of attention and channels of the MLP are *groups* of an inner dimension: the rows of one or
several linear layers that write it and the columns of the one that reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from memlm.models.decoder import Decoder
from memlm.models.encoder import Encoder


@dataclass(frozen=True)
class Site:
    """An inner dimension of ``groups`` equal groups.

    ``out`` reads it: its columns are the groups, one after the other.  ``sources`` write it: each
    a linear layer and the rows that a group has of each of its parts, which follow one another:
    ``(qkv, (64, 64, 64))`` has the rows of all groups' queries, then those of their keys, then
    those of their values.
    """

    out: nn.Linear
    sources: tuple[tuple[nn.Linear, tuple[int, ...]], ...]
    groups: int

    def columns(self, groups: torch.Tensor) -> torch.Tensor:
        """The columns of ``out`` that belong to ``groups``."""
        return _members(groups, self.out.in_features // self.groups)

    def keep_(self, groups: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Keeps these groups only, in this order; ``out`` gets this weight, ``[n, their columns]``,
        and, where it has a bias, this."""
        for linear, sizes in self.sources:
            rows, start = [], 0
            for size in sizes:
                rows.append(start + _members(groups, size))
                start += self.groups * size
            rows = torch.cat(rows)
            _set(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
        _set(self.out, weight, bias)


def _members(groups: torch.Tensor, size: int) -> torch.Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _set(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Gives the layer new tensors, of its dtype, and the sizes that they have."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        old = linear._parameters[name]
        if old is not None:
            new = tensor.detach().to(old.dtype).contiguous()
            linear._parameters[name] = nn.Parameter(new, old.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


class Family(ABC):
    """One kind of model: ``layers`` in their order, and ``heads`` and ``channels``, the numbers of
    groups that each of them has."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList):
        self.model, self.layers = model, layers

    heads: int
    channels: int

    @abstractmethod
    def attention(self, layer: nn.Module) -> Site:
        """The heads; with grouped queries a key-value head with the query heads that read it."""

    @abstractmethod
    def mlp(self, layer: nn.Module) -> Site:
        """The channels."""

    def check(self, heads: int) -> None:
        """Raises ValueError unless so many heads can be taken out and a config can say so."""

    def set_heads(self, layer: nn.Module, heads: int) -> None:
        """What a layer itself knows of its heads, after some were taken out."""

    @abstractmethod
    def resize_(self, kept: Sequence[int], heads: int, channels: int) -> None:
        """What the model and its config know of its sizes, after the layers ``kept`` stayed, with
        so many groups each."""

    def run(self, batch) -> None:
        """The model on one batch of the calibration, at least as far as its layers."""
        self.model(*batch) if isinstance(batch, tuple) else self.model(batch)

    def mask(self, batch) -> torch.Tensor | None:
        """Which positions of a batch are tokens, bool ``[batch, length]``; None: all."""
        return batch[1].bool() if isinstance(batch, tuple) else None


class _OfDecoder(Family):
    def __init__(self, model: Decoder):
        super().__init__(model, model.layers)
        self.heads, self.channels = model.config.kv_heads, model.config.intermediate_size

    def attention(self, layer) -> Site:
        dim, queries = self.model.config.head_dim, self.model.config.heads // self.heads
        qkv = (layer.attention.qkv_proj, (queries * dim, dim, dim))
        return Site(layer.attention.o_proj, (qkv,), self.heads)

    def mlp(self, layer) -> Site:
        return Site(layer.mlp.down_proj, ((layer.mlp.gate_up_proj, (1, 1)),), self.channels)

    def set_heads(self, layer, heads) -> None:
        old = self.model.config
        layer.attention.heads, layer.attention.kv_heads = old.heads // old.kv_heads * heads, heads

    def resize_(self, kept, heads, channels) -> None:
        model, old = self.model, self.model.config
        windows = tuple(old.windows[i] for i in kept) if old.windows else ()
        config = replace(
            old, layers=len(kept), heads=old.heads // old.kv_heads * heads, kv_heads=heads,
            intermediate_size=channels, windows=windows,
        )  # fmt: skip
        model.config = model.rotary.config = config
        for i, layer in enumerate(self.layers):
            layer.attention.layer = i
        model._native = None
        if hasattr(model, "hf_config"):
            changes = _llama_sizes(model.hf_config, kept, config.heads, heads, channels)
            if windows and model.hf_config["model_type"] != "mistral":
                # Otherwise they follow from the layers' numbers.
                changes["layer_types"] = [
                    "sliding_attention" if window else "full_attention" for window in windows
                ]
            changes["head_dim"] = config.head_dim
            model.hf_config = {**model.hf_config, **changes}


class _OfEncoder(Family):
    def __init__(self, model: Encoder):
        super().__init__(model, model.layers)
        self.heads, self.channels = model.config.heads, model.config.intermediate_size

    def attention(self, layer) -> Site:
        dim = self.model.config.head_dim
        return Site(layer.o_proj, ((layer.qkv_proj, (dim, dim, dim)),), self.heads)

    def mlp(self, layer) -> Site:
        return Site(layer.down_proj, ((layer.up_proj, (1,)),), self.channels)

    def set_heads(self, layer, heads) -> None:
        layer.heads = heads

    def resize_(self, kept, heads, channels) -> None:
        model = self.model
        model.config = replace(
            model.config, layers=len(kept), heads=heads, intermediate_size=channels
        )
        if hasattr(model, "hf_config"):
            sizes = {
                "num_hidden_layers": len(kept),
                "num_attention_heads": heads,
                "head_dim": model.config.head_dim,
                "intermediate_size": channels,
            }
            model.hf_config = {**model.hf_config, **sizes}


class _OfHf(Family):
    """Models of transformers: those of one base model, with or without a head."""

    def __init__(self, model: nn.Module, base: nn.Module, layers: nn.ModuleList):
        super().__init__(model, layers)
        self.base, self.config = base, model.config
        self.channels = self.config.intermediate_size

    # Of the calls of the base model.
    SETTINGS = {}

    def run(self, batch) -> None:
        if isinstance(batch, Mapping):
            self.base(**batch, **self.SETTINGS)
        else:
            self.base(batch, **self.SETTINGS)

    def mask(self, batch) -> torch.Tensor | None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return None if mask is None else mask.bool()


class _OfHfLlama(_OfHf):
    SETTINGS = {"use_cache": False}  # layers are called several times

    def __init__(self, model):
        base = getattr(model, "model", model)
        super().__init__(model, base, base.layers)
        self.heads = self.config.num_key_value_heads

    def attention(self, layer) -> Site:
        part = layer.self_attn
        dim, queries = part.head_dim, part.num_key_value_groups
        sources = ((part.q_proj, (queries * dim,)), (part.k_proj, (dim,)), (part.v_proj, (dim,)))
        return Site(part.o_proj, sources, self.heads)

    def mlp(self, layer) -> Site:
        part = layer.mlp
        return Site(part.down_proj, ((part.gate_proj, (1,)), (part.up_proj, (1,))), self.channels)

    def _sizes(self, kept, heads: int, channels: int) -> dict:
        queries = self.layers[0].self_attn.num_key_value_groups * heads
        dim = self.layers[0].self_attn.head_dim
        sizes = _llama_sizes(self.config.to_dict(), kept, queries, heads, channels)
        return sizes | {"head_dim": dim}

    def check(self, heads) -> None:
        from huggingface_hub.errors import StrictDataclassError  # transformers has it

        sizes = self._sizes(range(len(self.layers)), self.heads - heads, self.channels)
        try:
            type(self.config).from_dict(self.config.to_dict() | sizes)
        except StrictDataclassError as error:
            raise ValueError(f"heads: transformers refuses: {error.__cause__ or error}") from None

    def resize_(self, kept, heads, channels) -> None:
        for key, value in self._sizes(kept, heads, channels).items():
            setattr(self.config, key, value)
        for i, layer in enumerate(self.layers):
            layer.self_attn.layer_idx = i
            layer.mlp.intermediate_size = channels


class _OfHfBert(_OfHf):
    def __init__(self, model):
        base = getattr(model, "bert", model)
        super().__init__(model, base, base.encoder.layer)
        self.heads = self.config.num_attention_heads

    def check(self, heads: int) -> None:
        if heads:
            self.attention(self.layers[0])

    def attention(self, layer) -> Site:
        raise ValueError(
            "heads: transformers' BERT has hidden_size / heads numbers for each head, and "
            "cannot have fewer heads of the same size; memlm.load(folder) can"
        )

    def mlp(self, layer) -> Site:
        source = (layer.intermediate.dense, (1,))
        return Site(layer.output.dense, (source,), self.channels)

    def resize_(self, kept, heads, channels) -> None:
        self.config.num_hidden_layers, self.config.intermediate_size = len(kept), channels


def _llama_sizes(config: dict, kept, heads: int, kv_heads: int, channels: int) -> dict:
    """What changes in the config of a model of the Llama family, by Hugging Face's names."""
    sizes = {
        "num_hidden_layers": len(kept),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": channels,
    }
    if isinstance(config.get("layer_types"), list):
        sizes["layer_types"] = [config["layer_types"][i] for i in kept]
    return sizes


def family_of(model: nn.Module) -> Family:
    """Raises TypeError for a model of another kind."""
    if isinstance(model, Decoder):
        return _OfDecoder(model)
    if isinstance(model, Encoder):
        return _OfEncoder(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        return _OfHfLlama(model)
    if kind == "bert":
        return _OfHfBert(model)
    raise TypeError(
        f"model: got {type(model).__name__}, accepted are memlm's Decoder and Encoder and "
        "transformers' models of llama, mistral, qwen2, qwen3 and bert"
    )


class Reached(Exception):
    """What was to be seen has been seen: the rest of the model need not run."""


def calls_of_layers(family: Family, batch) -> tuple[torch.Tensor, list[Callable]]:
    """What enters the first layer for one batch, and for each layer a function that calls it as the
    model does: hidden states ``[batch, length, hidden]`` -> hidden states.  The layers do not run.
    """
    entered, calls = [], []

    def record(layer: nn.Module):
        def forward(hidden, *args, **kwargs):
            entered.append(hidden)
            calls.append(lambda x: _hidden(layer(x, *args, **kwargs)))
            if len(calls) == len(family.layers):
                raise Reached
            return hidden

        return forward

    before = [vars(layer).get("forward") for layer in family.layers]
    try:
        for layer in family.layers:
            layer.forward = record(layer)
        family.run(batch)
    except Reached:
        pass
    finally:
        for layer, forward in zip(family.layers, before):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward
    return entered[0], calls


def _hidden(result) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def input_of(linear: nn.Linear, run: Callable[[], object]) -> torch.Tensor:
    """What ``linear`` is given when ``run`` calls it; what comes after it does not run."""
    seen = []

    def stop(_, args):
        seen.append(args[0])
        raise Reached

    hook = linear.register_forward_pre_hook(stop)
    try:
        run()
    except Reached:
        pass
    finally:
        hook.remove()
    return seen[0]


class Run:
    """One batch on its way through the layers: its hidden ``states``, now, the layers' ``calls``
    and, where not all of it are tokens, a ``mask``."""

    def __init__(self, family: Family, batch):
        self.states, self.calls = calls_of_layers(family, batch)
        self.mask = family.mask(batch)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, length, k]`` -> f32 ``[tokens, k]``."""
        return (x.flatten(0, -2) if self.mask is None else x[self.mask]).float()
