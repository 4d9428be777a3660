"""Decoder layers of Hugging Face's Llama family as one call each::

    memlm.quantize_(model, "int4")          # or a packed folder through from_pretrained
    memlm.hf.fuse_layers(model)
    model.generate(**inputs)                # with a memlm.hf.PagedCache, unless told otherwise

The layers keep their modules, names and class (they become instances of a subclass of it), so that
saving, hooks and adapters go on as before.  A layer runs as one call of the library where nothing but
values is asked for and the cache is a PagedCache; else as transformers has it.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers.generation import GenerationMode

from memlm.formats import TILE_ROWS
from memlm.hf_cache import PagedCache
from memlm.layers import Linear, linear_of
from memlm.layers.native import LINEARS, LayerParts, NativeLayers, Watch, can_run, is_plain
from memlm.layers.packed import split_rows, stack_rows

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class _Fused:
    """What makes a decoder layer of transformers one call; mixed into its class by
    :func:`fuse_layers`."""

    _kind: type[nn.Module]  # the class it was
    _native: tuple[NativeLayers, Watch] | None = None

    def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, **kwargs):
        angles = kwargs.get("position_embeddings")
        native = None
        if isinstance(cache, PagedCache) and cache.reads_blocks and can_run(hidden_states):
            native = self._current(hidden_states.dtype)
        if native is None or angles is None or kwargs.get("output_attentions"):
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **kwargs
            )  # fmt: skip
        return cache.run(native, self.self_attn.layer_idx, hidden_states, angles, attention_mask)

    def _current(self, dtype: torch.dtype) -> NativeLayers | None:
        """This layer for the library, built anew when its modules are no longer what they were."""
        if self._native is None or not self._native[1].unchanged():
            self._native = None
            try:
                self._native = NativeLayers([_parts(self)]), Watch([self])
            except ValueError:
                return None
        native = self._native[0]
        return native if native.dtype == dtype else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_native": None}  # addresses are of this process

    def __reduce__(self):
        return _rebuilt, (self._kind,), self.__getstate__()


@functools.cache
def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (_Fused, kind), {"__module__": __name__, "_kind": kind})


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    made = _fused_class(kind)
    return made.__new__(made)


def _norm(module: nn.Module | None) -> torch.Tensor | None:
    if module is None:
        return None
    if not (type(module).__name__.endswith("RMSNorm") and is_plain(module, type(module))):
        raise ValueError(f"norm: got {type(module).__name__}, accepted are RMSNorms without hooks")
    return module.weight


def _rows_as_one(layers: list[nn.Module]) -> Linear:
    """The layers as one.  Where they are no neighbours in memory yet, their tensors become views of
    those of the one, so that the weights are there once."""
    for layer in layers:
        if not is_plain(layer, *LINEARS):
            raise ValueError(f"linear: got {type(layer).__name__}, accepted is memlm's Linear, no hooks")
    first = layers[0]
    if len({layer.mode for layer in layers}) > 1 or any(layer.order is not None for layer in layers):
        raise ValueError("linear: layers of one input have modes or orders of their own")
    if any(layer.n % TILE_ROWS for layer in layers):
        raise ValueError(f"linear: got {[layer.n for layer in layers]} rows, accepted are multiples of 16")
    whole = stack_rows([layer.packed for layer in layers])
    for layer, part in zip(layers, split_rows(whole, [layer.n for layer in layers])):
        for name, tensor in part.tensors().items():
            if name in layer._buffers:
                layer._buffers[name] = tensor
            else:
                layer._parameters[name].data = tensor
    biases = [layer.bias for layer in layers]
    bias = None
    if any(b is not None for b in biases):
        parts = [first.first.new_zeros(x.n) if x.bias is None else x.bias.detach() for x in layers]
        bias = torch.cat([p.to(next(b for b in biases if b is not None).dtype) for p in parts])
    return linear_of(whole, bias, first.mode)


def _parts(layer: nn.Module) -> LayerParts:
    """What the library needs of the layer.  Raises ValueError where it cannot run it."""
    attention, mlp = layer.self_attn, layer.mlp
    if not (is_plain(attention, type(attention)) and is_plain(mlp, type(mlp))):
        raise ValueError("layer: its attention or MLP has hooks")
    if attention.config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"layer: activation {attention.config.hidden_act!r}, accepted is silu")
    if abs(attention.scaling * attention.head_dim**0.5 - 1) > 1e-6:
        raise ValueError(f"layer: scores are scaled by {attention.scaling}, not 1 / sqrt(head_dim)")
    norms = [
        layer.input_layernorm,
        layer.post_attention_layernorm,
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
    ]
    weights = [_norm(norm) for norm in norms]
    eps = {norm.variance_epsilon for norm in norms if norm is not None}
    if len(eps) > 1:
        raise ValueError("layer: its norms have several eps")
    for linear in (attention.o_proj, mlp.down_proj):
        if not is_plain(linear, *LINEARS):
            raise ValueError(f"linear: got {type(linear).__name__}, accepted is memlm's Linear, no hooks")
    return LayerParts(
        *weights,
        eps.pop(),
        _rows_as_one([attention.q_proj, attention.k_proj, attention.v_proj]),
        attention.o_proj,
        _rows_as_one([mlp.gate_proj, mlp.up_proj]),
        mlp.down_proj,
        _window(attention),
    )


def _window(attention: nn.Module) -> int:
    config = attention.config
    default = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return getattr(attention, "sliding_window", default) or 0


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if {c.__name__ for c in type(m).__mro__} & set(LAYERS)]


def fuse_layers(model: nn.Module, kv: str | None = None) -> nn.Module:
    """Makes the decoder layers of a Llama, Mistral, Qwen2 or Qwen3 model of transformers, whose linear
    layers are memlm's, one call each, in place; returns it.

    The model takes the attention implementation ``"memlm"``, and ``generate`` a new
    :class:`memlm.hf.PagedCache` that stores keys and values as ``kv`` (f32, bf16, int8, int4; None: as
    the model computes), unless it is given a cache, or the name of one, or has a sliding window and
    drafts to take back (assisted decoding, prompt lookup), which needs what the window has evicted.
    Query, key and value become views of one matrix, and so do gate and up.

    Raises ValueError, before anything has changed, where a layer is none of these or cannot run as one
    call, and says why.
    """
    layers = _decoder_layers(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layers of {', '.join(LAYERS)}")
    if layers[0].input_layernorm.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError("model: accepted dtypes are float32, bfloat16, float16")
    for i, layer in enumerate(layers):
        try:
            NativeLayers([_parts(layer)])
        except ValueError as error:
            raise ValueError(f"model: layer {i}: {error}") from None
    model.set_attn_implementation("memlm")
    for layer in layers:
        if not isinstance(layer, _Fused):
            layer.__class__ = _fused_class(type(layer))
    if hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = functools.partial(_prepare_cache, model, kv)
    return model


def unfuse_layers(model: nn.Module) -> nn.Module:
    """Undoes :func:`fuse_layers`, in place; returns the model.  The attention implementation stays."""
    for layer in _decoder_layers(model):
        if isinstance(layer, _Fused):
            layer.__dict__.pop("_native", None)
            layer.__class__ = layer._kind
    model.__dict__.pop("_prepare_cache_for_generation", None)
    return model


def _prepare_cache(model, kv, generation_config, model_kwargs, generation_mode, *args):
    """transformers' ``_prepare_cache_for_generation``, with a PagedCache where it would take its
    default."""
    default = generation_config.use_cache is not False and not generation_config.cache_implementation
    if default and model_kwargs.get("cache") is None:
        if kv is None:
            kv = "bf16" if model.dtype == torch.bfloat16 else "f32"
        cache = PagedCache(model.config, kv)
        drafts = generation_mode == GenerationMode.ASSISTED_GENERATION
        if cache.is_croppable or not (drafts or generation_config.is_assistant):
            model_kwargs["cache"] = cache
            return None
    return type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, generation_mode, *args
    )
