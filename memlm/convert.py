"""Drop-in replacement: packed layers into any ``nn.Module``, and back."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from memlm import formats, sparse_formats
from memlm._format import parse_format
from memlm.formats import Format, Packed
from memlm.layers import Embedding, Linear, PackedModule, SparseLinear, linear_of
from memlm.layers.linear import is_conv1d, linear_weight
from memlm.ops import mode_for
from memlm.ops._matmul import X_DTYPES
from memlm.quantize import lacks_zeros, pack_weight
from memlm.selection import Selection
from memlm.sparse_formats import SparseFormat, SparsePacked, SparseTensors

# Set on a module that quantize_ left as it is: the reason, for explain.
LEFT_ALONE = "_memlm_left_alone"
# Set on torch's encoder modules while they hold packed layers: the value that was there before.
_FAST_PATH = "_memlm_fast_path"


@dataclass(frozen=True)
class QuantConfig(Selection):
    """What to quantise, and how.

    linear: format (``"int4"``, ``"int4a-g64"``, ``"int8"`` ..., :mod:`memlm.formats`) of linear
        layers and of Hugging Face's Conv1D; None leaves them alone.  A sparse one
        (``"block/int4"``, ``"2:4/int4"`` ..., :mod:`memlm.sparse_formats`) is for layers that have
        been pruned, and leaves alone those without zeros that it could leave out.
    embedding: format of embeddings, and of an output head that is tied to one; None leaves them
        alone.
    head: format of an untied output head (the model's ``get_output_embeddings()``, or a layer
        named ``lm_head``); None leaves it alone.
    targets: pattern -> format of either kind (None: left alone) of layers that differ from these
        three; the first that matches counts.  A pattern is a layer's name, the name of its class (``"Linear"``), or
        ``"re:"`` and a regular expression that matches from the name's start, as in
        compressed-tensors' ``targets``.
    ignore: patterns of layers to leave alone, whatever else is said.
    mode: arithmetic of the linear layers, ``"fast"``, ``"accurate"`` or, for 8 bits, ``"w8a8"``
        (:func:`memlm.ops.w4_matmul`, :func:`memlm.ops.w8a8_matmul`); None takes fast for 2 and 4 bits
        and accurate for 8.
    """

    linear: str | Format | SparseFormat | None = "int4"
    embedding: str | Format | None = None
    head: str | Format | SparseFormat | None = None
    mode: str | None = None
    targets: Mapping[str, str | Format | SparseFormat | None] = field(default_factory=dict)
    ignore: Sequence[str] = ()

    def __post_init__(self):
        self.check_selection("format")
        for name in ("linear", "embedding", "head"):
            object.__setattr__(self, name, _parse(name, getattr(self, name)))
        if isinstance(self.embedding, SparseFormat):
            raise ValueError(f"embedding: got {self.embedding}, {_DENSE_ONLY}")
        targets = {p: _parse(f"targets: {p}", format) for p, format in self.targets.items()}
        object.__setattr__(self, "targets", targets)
        for format in self.formats if self.mode is not None else ():
            mode_for(format, self.mode)

    @property
    def formats(self) -> list[Format | SparseFormat]:
        """All that it names."""
        named = (self.linear, self.embedding, self.head, *self.targets.values())
        return [format for format in named if format is not None]

    def format_of(self, name: str, kind: str, role: str) -> Format | SparseFormat | None:
        """The format of the layer ``name`` of class ``kind``, whose ``role`` is linear, embedding or
        head; None: left alone."""
        return self.target_of(name, kind, getattr(self, role))


_DENSE_ONLY = "accepted for embeddings are dense formats"


def _parse(what: str, value) -> Format | SparseFormat | None:
    try:
        return None if value is None else parse_format(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def quantize_(
    model: nn.Module,
    config: QuantConfig | str | Format | SparseFormat = QuantConfig(),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Replaces the linear and embedding layers of ``model`` by packed ones, in place.

    Layer by layer: a float weight is let go as soon as its packed form exists, so the peak is the
    model plus one packed layer and the work on it.  Weights shared by several layers (a tied head)
    are packed once and stay shared.  Decided first, then done: whatever is refused is refused
    before anything is changed.

    config: a :class:`QuantConfig`, or a format for the linear layers.
    filter_fn: ``filter_fn(module, name) -> bool``: which of the layers to replace.
    strict: refuse (ValueError naming the layers and reasons) rather than leave alone a linear or
        embedding layer that ``config`` and ``filter_fn`` selected.
    progress: called with (done, total, name) after each layer.

    Returns the model.  :func:`memlm.explain` lists what runs where, and what was left alone and
    why.  Raises ValueError naming the layer for a weight with NaN or Inf, and for a ``model`` that
    is itself one layer, which nobody can replace in place.
    """
    _check_model(model)
    if isinstance(config, (str, Format, SparseFormat)):
        config = QuantConfig(linear=config)
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config: got {type(config).__name__}, accepted are QuantConfig or a name")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got {type(filter_fn).__name__}, expected a function")
    if _is_layer(model):
        raise ValueError(
            f"model: is itself a {type(model).__name__}, which cannot be replaced in place; use "
            "memlm.layers.Linear.from_float or memlm.layers.Embedding.from_float"
        )

    plan, left = _plan(model, config, filter_fn)
    if strict and (refused := [x for x in left if x.wanted]):
        listed = "; ".join(f"{x.name}: {x.reason}" for x in refused)
        raise ValueError(f"strict: {len(refused)} layers cannot be replaced: {listed}")
    for x in left:
        setattr(x.module, LEFT_ALONE, x.reason)
    del left

    places = _places(model)
    done, total = 0, sum(len(group.layers) for group in plan)
    while plan:  # emptied on the way: it holds the float layers
        for name in _replace(plan.popleft(), config.mode, places):
            done += 1
            if progress:
                progress(done, total, name)
    _tell_parents(model)
    return model


def sparsify_(
    model: nn.Module,
    config: QuantConfig | str | SparseFormat,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Replaces the linear layers of ``model`` that have been pruned by
    :class:`memlm.layers.SparseLinear`, in place: :func:`quantize_` with a sparse format.

    Layers that have no zeros which the pattern leaves out (a whole block, two of every 4, any)
    stay as they are, and so do embeddings and the head unless the config says otherwise:
    :func:`memlm.explain` tells why.  ``quantize_`` afterwards packs what is still float.

    config: a sparse format, or a :class:`QuantConfig` that has one.
    filter_fn, strict, progress: as for :func:`quantize_`, and so are the result and what is raised;
        ValueError for a config without a sparse format.
    """
    if not isinstance(config, QuantConfig):
        config = QuantConfig(linear=SparseFormat.parse(config))
    if not any(isinstance(format, SparseFormat) for format in config.formats):
        raise ValueError("config: has no sparse format, such as 'block/int4'; see quantize_")
    return quantize_(model, config, filter_fn, strict, progress)


@dataclass(frozen=True)
class _Group:
    """Layers to replace that share one weight."""

    layers: deque[tuple[str, nn.Module]]
    format: Format | SparseFormat


@dataclass(frozen=True)
class _Left:
    """A layer to leave as it is; ``wanted``: although config and filter_fn selected it."""

    name: str
    module: nn.Module
    reason: str
    wanted: bool


def _replace(group: _Group, mode: str | None, places) -> Iterator[str]:
    """Packs a group's weight and puts packed layers in its layers' places, which leave the group
    one by one; yields their names."""
    packed = None
    while group.layers:
        name, module = group.layers.popleft()
        if packed is None:
            packed = _quantize(name, module, group.format)
        if isinstance(module, nn.Embedding):
            new = Embedding(packed, module.weight.dtype, module.padding_idx)
        else:
            new = linear_of(packed, module.bias, mode, module.weight.dtype)
        _put(places, module, new)
        del module
        yield name


def _plan(
    model, config: QuantConfig, filter_fn, meta: bool = False
) -> tuple[deque[_Group], list[_Left]]:
    """What to replace, and what to leave alone.  Changes nothing.  ``meta``: weights on the meta
    device are still to come."""
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if _is_layer(module)}
    holders = defaultdict(list)  # id of a parameter -> names of all modules that hold it
    for name, module in modules.items():
        for parameter in module._parameters.values():
            holders[id(parameter)].append(name)
    heads = _heads(modules)
    attention = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}

    def role_of(name: str) -> str:
        if isinstance(layers[name], nn.Embedding):
            return "embedding"
        return "head" if name in heads else "linear"

    config.check_patterns((name, type(module).__name__) for name, module in layers.items())
    left, planned = [], {}
    for name, module in layers.items():
        weight = module._parameters.get("weight")
        owners = [name] if weight is None else holders[id(weight)]
        # Layers that share a weight are treated as one of them: the embedding before the head.
        roles = {role_of(owner): owner for owner in owners if owner in layers}
        role = next(r for r in ("embedding", "head", "linear") if r in roles)
        owner = roles[role]
        format = config.format_of(owner, type(layers[owner]).__name__, role)
        if format is None:
            plain = getattr(config, role) is None
            reason = f"config: {role}=None" if plain else "config: ignored by a pattern"
            left.append(_Left(name, module, reason, wanted=False))
        elif filter_fn is not None and not filter_fn(module, name):
            left.append(_Left(name, module, "filter_fn", wanted=False))
        elif reason := _obstacle(module, weight, meta) or _misfit(module, format):
            left.append(_Left(name, module, reason, wanted=True))
        elif id(module) in attention:
            reason = "nn.MultiheadAttention reads its weight without calling it"
            left.append(_Left(name, module, reason, wanted=True))
        else:
            planned[name] = format

    groups = {}
    for name, format in planned.items():
        module = layers[name]
        # All holders of a weight or none: one that is left would keep the float weight alive.
        stays = [owner for owner in holders[id(module.weight)] if owner not in planned]
        if stays:
            reason = f"shares its weight with {stays[0] or 'the model itself'}, which keeps it"
            left.append(_Left(name, module, reason, wanted=True))
            continue
        # Conv1D holds its weight transposed: sharing with a Linear is not sharing packed forms.
        key = (id(module.weight), is_conv1d(module))
        if key not in groups:
            weight = module.weight.detach()
            if not weight.is_meta and not all(torch.isfinite(end) for end in torch.aminmax(weight)):
                raise ValueError(f"{name}: its weight contains NaN or Inf")
            groups[key] = _Group(deque(), format)
        groups[key].layers.append((name, module))
    return deque(groups.values()), left


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def _heads(modules: dict[str, nn.Module]) -> set[str]:
    """Names of the output heads, of the model and of models inside it."""
    heads = {name for name in modules if name.rpartition(".")[2] == "lm_head"}
    found = set()
    for module in modules.values():
        get_head = getattr(module, "get_output_embeddings", None)
        if callable(get_head):
            try:
                found.add(id(get_head()))
            except NotImplementedError:  # Hugging Face's way to say that there is none
                pass
    return heads | {name for name, module in modules.items() if id(module) in found}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _obstacle(module: nn.Module, weight: nn.Parameter | None, meta: bool) -> str | None:
    """Why a layer cannot be replaced, or None.  ``meta``: its weight may be on the meta device."""
    kind = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrised: computed anew by each call"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks, which a new layer would lose"
    if weight is None:
        return "its weight is not a parameter of its own"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    bases = (nn.Linear, nn.Embedding)
    base = next(c for c in type(module).__mro__ if c in bases or c.__name__ == "Conv1D")
    if type(module).forward is not base.forward or "forward" in vars(module):
        return f"{kind} has a forward of its own: not just a {base.__name__}"
    if weight.is_meta and not meta:
        return "its weight is on the meta device: nothing to quantise"
    if weight.dtype not in X_DTYPES:
        return f"its weight is {weight.dtype}, kernels take {_names(X_DTYPES)}"
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its weight has shape {list(weight.shape)}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its weight"
    return None


def _misfit(module: nn.Module, format: Format | SparseFormat) -> str | None:
    """Why the weight of a layer cannot be stored in a sparse format, or need not; or None.  Nothing
    is known of a weight on the meta device."""
    if isinstance(format, Format):
        return None
    if isinstance(module, nn.Embedding):
        return f"config: {format}, {_DENSE_ONLY}"
    return None if module.weight.is_meta else lacks_zeros(linear_weight(module), format)


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _quantize(
    name: str, module: nn.Module, format: Format | SparseFormat
) -> Packed | SparsePacked:
    weight = module.weight if isinstance(module, nn.Embedding) else linear_weight(module)
    try:
        return pack_weight(weight, format)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> the (parent, name) pairs where it stands: there may be several."""
    places = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            places[id(child)].append((parent, name))
    return places


def _put(places, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for parent, name in places[id(old)]:
        parent._modules[name] = new


def _tell_parents(model: nn.Module) -> None:
    """What parents know about their layers' weights, after layers were replaced."""
    for module in model.modules():
        # In eval mode torch's encoder hands its layers' weights to one fused operation, which
        # would dequantise them: with packed layers inside, it takes its ordinary path.
        if isinstance(module, nn.TransformerEncoderLayer):
            _set_fast_path(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder):
            _set_fast_path(module, "use_nested_tensor", False)
        # Hugging Face ties, saves and resizes by the names of the tied tensors.
        for table in ("_tied_weights_keys", "all_tied_weights_keys"):
            names = getattr(module, table, None)
            if isinstance(names, dict):
                renamed = _rename_tied(module, names)
                if renamed != names:
                    setattr(module, table, renamed)
    if "memlm.hf" in sys.modules:  # transformers is in use
        sys.modules["memlm.hf"].follow(model)


def _set_fast_path(module: nn.Module, attribute: str, off) -> None:
    packed = any(isinstance(child, PackedModule) for child in module.modules())
    if packed and _FAST_PATH not in vars(module):
        setattr(module, _FAST_PATH, getattr(module, attribute))
        setattr(module, attribute, off)
    elif not packed and _FAST_PATH in vars(module):
        setattr(module, attribute, vars(module).pop(_FAST_PATH))


def _rename_tied(model: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """{target: source} names of tied tensors, with ``weight`` for float layers and the names of
    the packed tensors for packed ones."""
    modules = dict(model.named_modules())
    renamed = {}
    for target, source in names.items():
        (layer, _, leaf), source_layer = target.rpartition("."), source.rpartition(".")[0]
        module = modules.get(layer)
        leaves = [leaf]
        if leaf == "weight" and isinstance(module, PackedModule):
            leaves = list(module.packed.tensors())
        elif leaf in SparseLinear.PARTS and not isinstance(module, PackedModule):
            leaves = ["weight"]
        if leaves == [leaf]:
            renamed[target] = source
        else:
            renamed |= {f"{layer}.{new}": f"{source_layer}.{new}" for new in leaves}
    return renamed


def dequantize_(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replaces memlm's layers by ``torch.nn.Linear`` and ``torch.nn.Embedding`` with the
    dequantised weights and the biases in ``dtype`` (f32, bf16 or f16), in place and layer by layer
    (a Conv1D comes back as Linear, which computes the same).  Tied weights stay tied.

    Returns the model.  Raises TypeError for another dtype, ValueError for a ``model`` that is
    itself one layer (use its ``to_float``); the model is then unchanged.
    """
    _check_model(model)
    if dtype not in X_DTYPES:
        raise TypeError(f"dtype: got {dtype}, accepted are {X_DTYPES}")
    if isinstance(model, PackedModule):
        raise ValueError("model: is itself a layer and cannot be replaced in place; use to_float")
    layers = deque(module for module in model.modules() if isinstance(module, PackedModule))
    uses = defaultdict(int)
    for layer in layers:
        uses[memory_of(layer.first)] += 1
    weights: dict[int, nn.Parameter] = {}
    places = _places(model)
    while layers:
        layer = layers.popleft()
        key = memory_of(layer.first)
        new = layer.to_float(dtype)
        if uses[key] > 1:
            new.weight = weights.setdefault(key, new.weight)
        _put(places, layer, new)
        del layer
    _tell_parents(model)
    return model


def memory_of(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory (of which there is none on the meta device)."""
    return tensor.data_ptr() or tensor.untyped_storage()._cdata


def layer_specs(model: nn.Module) -> dict[str, dict]:
    """For each memlm layer, by name, what :func:`build_layers_` needs to make it again; plain
    JSON.  ``tied_to`` names the earlier layer that holds the same tensors."""
    specs: dict[str, dict] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        spec = spec_of(module)
        owner = first.setdefault(memory_of(module.first), name)
        if owner != name:
            spec["tied_to"] = owner
        specs[name] = spec
    return specs


def spec_of(module: PackedModule, packed: Packed | SparsePacked | None = None) -> dict:
    """The spec of one layer, see :func:`layer_specs`; or of one of ``packed``, some of its rows."""
    w = module if packed is None else packed
    spec = {
        "type": "Linear" if isinstance(module, Linear) else "Embedding",
        "format": module.format.name,
        "n": w.n,
        "k": w.k,
        "dtype": _names([module.dtype]),
    }
    if w.scales is not None:
        spec["scale_dtype"] = _names([w.scales.dtype])
    if isinstance(module.format, SparseFormat):
        spec["stored"] = sparse_formats.stored(module.format, w.codes)
    if module.order is not None:
        spec["order"] = True
    if isinstance(module, Linear):
        spec |= {"bias": module.bias is not None, "mode": module.mode}
    return spec


_DTYPES = {_names([dtype]): dtype for dtype in X_DTYPES}


def build_layers_(model: nn.Module, specs: dict[str, dict]) -> nn.Module:
    """Replaces the modules named in ``specs`` (:func:`layer_specs`) by memlm layers whose tensors
    are on the meta device, to be assigned (``load_state_dict(..., assign=True)``).  A layer that
    is ``tied_to`` another holds that one's tensors.

    Raises ValueError for a spec that is malformed or does not fit the module it replaces; the
    model is then unchanged.
    """
    modules = dict(model.named_modules())
    new: dict[str, PackedModule] = {}
    for name, spec in sorted(specs.items(), key=lambda item: "tied_to" in item[1]):
        old = modules.get(name)
        if old is None or old is model or not _is_layer(old):
            raise ValueError(f"layers: {name}: the model has no such layer to replace")
        try:
            new[name] = _build(old, spec)
            if "tied_to" in spec:
                new[name].weight = new[spec["tied_to"]].weight
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"layers: {name}: malformed spec: {error}") from None
    places = _places(model)
    for name, layer in new.items():
        _put(places, modules[name], layer)
    _tell_parents(model)
    return model


def _build(old: nn.Module, spec: dict) -> PackedModule:
    """The empty layer of a spec.  Raises KeyError, TypeError or ValueError."""
    kind = "Embedding" if isinstance(old, nn.Embedding) else "Linear"
    weight = old.weight if kind == "Embedding" else linear_weight(old)
    n, k = spec["n"], spec["k"]
    if (spec["type"], n, k) != (kind, *weight.shape):
        shape = "x".join(map(str, weight.shape))
        raise ValueError(f"{spec['type']} {n}x{k}, but the model has {kind} {shape}")
    packed = _empty(parse_format(spec["format"]), *weight.shape, spec)
    dtype, order = _DTYPES[spec["dtype"]], None
    if spec.get("order"):
        order = torch.empty(packed.k, dtype=torch.int32, device="meta")
    if kind == "Embedding":
        if isinstance(packed, SparseTensors):
            raise ValueError(f"format {packed.format}, {_DENSE_ONLY}")
        return Embedding(packed, dtype, old.padding_idx)
    if spec["bias"] is not (old.bias is not None):
        raise ValueError(f"bias {spec['bias']}, but the model's is {old.bias is not None}")
    bias = None if old.bias is None else torch.empty(packed.n, dtype=dtype, device="meta")
    return linear_of(packed, bias, spec["mode"], dtype, order)


def _empty(format: Format | SparseFormat, n: int, k: int, spec: dict) -> Packed | SparseTensors:
    """A packed matrix on the meta device."""
    sparse = isinstance(format, SparseFormat)
    scales = () if sparse and format.is_float else (_DTYPES[spec["scale_dtype"]],)
    if sparse:
        stored = sparse_formats.check_stored(format, n, k, spec["stored"])
        kind, parts = SparseTensors, sparse_formats.layout(format, n, k, stored, *scales)
    else:
        kind, parts = Packed, formats.layout(format, n, k, *scales)
    tensors = {
        part: torch.empty(shape, dtype=dtype, device="meta")
        for part, (shape, dtype) in parts.items()
    }
    return kind(format, n, k, **tensors)
