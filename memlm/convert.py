"""Drop-in replacement: packed layers into any ``nn.Module``, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from memlm.formats import SCALE_DTYPES, Format, Packed, layout
from memlm.layers import Embedding, Linear, PackedModule
from memlm.ops import check_mode
from memlm.quantize import quantize_weight

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Set on a module that quantize_ was asked for and left as it is: the reason, for explain.
LEFT_ALONE = "_memlm_left_alone"


@dataclass(frozen=True)
class QuantConfig:
    """What to quantise, and how.

    linear: format (``"int4"``, ``"int4a-g64"``, ``"int8"`` ..., :mod:`memlm.formats`) of linear
        layers and of Hugging Face's Conv1D; None leaves them alone.
    embedding: format of embeddings, and of an output head that is tied to one; None leaves them
        alone.
    head: format of an untied output head (the model's ``get_output_embeddings()``, or a layer
        named ``lm_head``); None leaves it alone.
    mode: arithmetic of the linear layers, ``"fast"`` or ``"accurate"``
        (:func:`memlm.ops.w4_matmul`).
    """

    linear: str | Format | None = "int4"
    embedding: str | Format | None = None
    head: str | Format | None = None
    mode: str = "fast"

    def __post_init__(self):
        for field in ("linear", "embedding", "head"):
            value = getattr(self, field)
            if value is not None:
                try:
                    object.__setattr__(self, field, Format.parse(value))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{field}: {error}") from None
        check_mode(self.mode)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D (known without importing transformers)."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def quantize_(
    model: nn.Module,
    config: QuantConfig | str = QuantConfig(),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    strict: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Replaces the linear and embedding layers of ``model`` by packed ones, in place.

    Layer by layer: a float weight is let go as soon as its packed form exists, so the peak is the
    model plus one packed layer.  Weights shared by several modules (a tied head) are packed once
    and stay shared.

    config: a :class:`QuantConfig`, or the name of a format for the linear layers.
    filter_fn: ``filter_fn(module, name) -> bool``: which of the layers to replace.
    strict: refuse (ValueError naming the layers and reasons, model unchanged) rather than leave a
        layer alone that ``config`` and ``filter_fn`` selected.
    progress: called with (done, total, name) for each layer.

    Returns the model.  :func:`memlm.explain` lists what runs where, and what was left alone and
    why.  Raises ValueError naming the layer for a weight with NaN or Inf, and for a ``model`` that
    is itself one layer; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(config, (str, Format)):
        config = QuantConfig(linear=config)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config: got {type(config).__name__}, accepted are QuantConfig or a name")
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise ValueError(
            "model: is itself a layer and cannot be replaced in place; use "
            "memlm.layers.Linear.from_float or memlm.layers.Embedding.from_float"
        )

    plan, left = _plan(model, config, filter_fn)
    if strict and left:
        listed = "; ".join(f"{name}: {reason}" for name, (_, reason) in left.items())
        raise ValueError(f"strict: {len(left)} layers cannot be replaced: {listed}")
    for module, reason in left.values():
        setattr(module, LEFT_ALONE, reason)

    # A weight held by several modules is packed with the first of them, its owner.
    owner_of_weight: dict[int, str] = {}
    owners = {name: owner_of_weight.setdefault(id(m.weight), name) for name, (m, _) in plan.items()}
    shared = {owner for name, owner in owners.items() if owner != name}
    packed_of: dict[str, Packed] = {}
    total = len(plan)
    for done, (name, owner) in enumerate(owners.items(), 1):
        module, format = plan.pop(name)
        packed = packed_of.get(owner)
        if packed is None:
            weight = module.weight.T if is_conv1d(module) else module.weight
            packed = quantize_weight(weight, format)
            del weight
            if name in shared:
                packed_of[name] = packed
        if isinstance(module, nn.Embedding):
            new = Embedding(packed, module.weight.dtype)
        else:
            new = Linear(packed, module.bias, config.mode)
        new.train(module.training)
        _replace(model, module, new)
        del module
        if progress:
            progress(done, total, name)
    _disable_fused_encoder(model)
    return model


def _plan(model, config: QuantConfig, filter_fn):
    """name -> (module, format) of what to replace; name -> (module, reason) of what is left."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    used_by_parent = {
        id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    plan, left = {}, {}
    for name, module in model.named_modules():
        is_embedding = isinstance(module, nn.Embedding)
        if not (is_embedding or isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        if is_embedding or id(module.weight) in embedded:
            field = "embedding"
        elif module is head or name.split(".")[-1] == "lm_head":
            field = "head"
        else:
            field = "linear"
        format = getattr(config, field)
        if format is None:
            setattr(module, LEFT_ALONE, f"config: {field}=None")
        elif filter_fn is not None and not filter_fn(module, name):
            setattr(module, LEFT_ALONE, "filter_fn")
        elif reason := _obstacle(module, id(module) in used_by_parent):
            left[name] = (module, reason)
        else:
            plan[name] = (module, format)
    # A tied weight is packed for all its owners or for none: half of them would keep it alive.
    for name, (module, _) in list(plan.items()):
        owners = [n for n, (m, _) in left.items() if m.weight is module.weight]
        if owners:
            left[name] = (module, f"shares its weight with {owners[0]}, which is left alone")
            del plan[name]
    for name, (module, _) in plan.items():
        if not torch.isfinite(module.weight).all():
            raise ValueError(f"{name}: its weight contains NaN or Inf")
    return plan, left


def _obstacle(module: nn.Module, used_by_parent: bool) -> str | None:
    """Why a layer cannot be replaced, or None."""
    if used_by_parent:
        return "nn.MultiheadAttention reads its weight without calling it"
    if type(module) not in (nn.Linear, nn.Embedding) and not is_conv1d(module):
        known = type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear
        if not known:
            return f"{type(module).__name__} may do more than its base class"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "has hooks, which a new layer would lose"
    if module.weight.device.type == "meta":
        return "its weight is on the meta device: nothing to quantise"
    if module.weight.dtype not in _FLOATS:
        return f"its weight is {module.weight.dtype}"
    if module.weight.dim() != 2 or module.weight.numel() == 0:
        return f"its weight has shape {list(module.weight.shape)}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its weight"
    return None


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``old`` stands (a module may have several parents)."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _disable_fused_encoder(model: nn.Module) -> None:
    """In eval mode nn.TransformerEncoderLayer hands its weights to one fused operation, which
    knows only float matrices; a layer with packed ones must take its ordinary path."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if isinstance(module.linear1, Linear) or isinstance(module.linear2, Linear):
                module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def dequantize_(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replaces memlm's layers by ``torch.nn.Linear`` and ``torch.nn.Embedding`` with the
    dequantised weights, in place (a Conv1D comes back as Linear, which computes the same).  Tied
    weights stay tied.  Returns the model."""
    weight_of: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if not isinstance(module, PackedModule):
            continue
        new = module.to_float(dtype)
        key = module.codes.data_ptr()
        new.weight = weight_of.setdefault(key, new.weight)
        new.train(module.training)
        _replace(model, module, new)
    return model


def layer_specs(model: nn.Module) -> dict[str, dict]:
    """For each memlm layer, by name, what :func:`build_layers_` needs to make it again; plain
    JSON.  ``tied_to`` names the earlier layer that holds the same tensors."""
    specs: dict[str, dict] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        spec = {
            "type": type(module).__name__,
            "format": module.format.name,
            "n": module.n,
            "k": module.k,
            "scale_dtype": str(module.scales.dtype).removeprefix("torch."),
        }
        if isinstance(module, Linear):
            spec |= {"bias": module.bias is not None, "mode": module.mode}
        owner = first.setdefault(module.codes.data_ptr(), name)
        if owner != name:
            spec["tied_to"] = owner
        specs[name] = spec
    return specs


def build_layers_(model: nn.Module, specs: dict[str, dict]) -> nn.Module:
    """Replaces the modules named in ``specs`` (:func:`layer_specs`) by memlm layers whose tensors
    are on the meta device, to be assigned.

    Raises ValueError for a spec that is malformed or does not fit the module it replaces.
    """
    modules = dict(model.named_modules())
    for name, spec in specs.items():
        old = modules.get(name)
        try:
            format, n, k = Format.parse(spec["format"]), spec["n"], spec["k"]
            scale_dtype = {str(d).removeprefix("torch."): d for d in SCALE_DTYPES}[
                spec["scale_dtype"]
            ]
            shapes = layout(format, n, k, scale_dtype)
            tensors = {
                part: torch.empty(shape, dtype=dtype, device="meta")
                for part, (shape, dtype) in shapes.items()
            }
            packed = Packed(format, n, k, **tensors)
            if spec["type"] == "Linear":
                bias = torch.empty(n, device="meta") if spec["bias"] else None
                new = Linear(packed, bias, spec["mode"])
                fits = isinstance(old, nn.Linear) and (old.out_features, old.in_features) == (n, k)
            elif spec["type"] == "Embedding":
                new = Embedding(packed)
                fits = isinstance(old, nn.Embedding) and tuple(old.weight.shape) == (n, k)
            else:
                raise ValueError(f"type {spec['type']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"layers: {name}: malformed spec: {error}") from None
        if not fits:
            raise ValueError(f"layers: {name}: the model has no such {n}x{k} {spec['type']}")
        _replace(model, old, new)
    return model
