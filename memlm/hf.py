"""Packed models in Hugging Face's transformers, through its own ``from_pretrained`` and
``save_pretrained``.

Imported by itself as soon as both libraries are.  From then on transformers knows the quantisation
method ``memlm``:

- a packed folder loads into memlm's layers: ``AutoModelForCausalLM.from_pretrained(folder)``;
- a float folder is quantised while it loads, weight by weight:
  ``from_pretrained(folder, quantization_config=memlm.hf.MemlmConfig(linear="int4"))``;
- ``save_pretrained`` writes both, and models that :func:`memlm.quantize_` quantised, as packed
  folders.

Weights are used where the file is mapped.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from transformers.utils.versions import require_version

from memlm import convert
from memlm._format import FILE_PARTS, FOLDER_VERSION
from memlm.convert import QuantConfig, build_layers_, dequantize_, layer_specs
from memlm.errors import FormatError
from memlm.hf_cache import PagedCache  # noqa: F401  (part of this)
from memlm.hf_layers import fuse_layers, unfuse_layers  # noqa: F401
from memlm.io.packed_folder import QUANT_METHOD, check_order
from memlm.io.pages import release
from memlm.layers import PackedModule
from memlm.quantize import pack_weight

# Earlier ones do not compare shapes where a quantizer is at work.
require_version("transformers>=5.23", "memlm loads nothing into earlier ones")


@register_quantization_config(QUANT_METHOD)
class MemlmConfig(QuantizationConfigMixin):
    """How a model is quantised, for transformers.

    settings: those of :class:`memlm.QuantConfig`, for a float model that is to be quantised.
    layers: of a packed model, module -> spec (:func:`memlm.layer_specs`); ``version`` is its
        folder's.

    Raises FormatError for layers of another version or malformed, and what ``QuantConfig`` raises.
    """

    def __init__(
        self,
        quant_method: str = QUANT_METHOD,
        version: int = FOLDER_VERSION,
        layers: dict[str, dict] | None = None,
        **settings,
    ):
        if version != FOLDER_VERSION:
            raise FormatError(
                f"quantization_config: version {version!r}; known is {FOLDER_VERSION}"
            )
        layers = {} if layers is None else layers
        if not isinstance(layers, dict) or not all(isinstance(s, dict) for s in layers.values()):
            raise FormatError("quantization_config: layers is malformed")
        self.quant_method, self.version, self.layers = quant_method, version, layers
        self.settings = QuantConfig(**settings)

    def to_dict(self) -> dict:
        """What config.json says of a packed model."""
        return {"quant_method": self.quant_method, "version": self.version, "layers": self.layers}


@register_quantizer(QUANT_METHOD)
class MemlmQuantizer(HfQuantizer):
    """The hooks that transformers calls, in this order when it loads a model."""

    def __init__(self, quantization_config: MemlmConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._names: dict[str, str] = {}  # packed layers: name in the file -> in the model
        self._groups: dict[str, convert._Group] = {}  # weight to quantise -> layers that hold it
        self._places = {}
        self._in_files = False  # whether weights to quantise are mapped, and this reader's alone
        self._ties: dict[str, str] = {}

    # Before loading: the model is on the meta device.

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            self._build(model)
        else:
            files = kwargs.get("checkpoint_files") or ()
            self._in_files = any(files) and all(str(f).endswith(".safetensors") for f in files)
            self._plan(model)

    def _build(self, model) -> None:
        modules, specs = dict(model.named_modules()), {}
        for name in self.quantization_config.layers:
            self._names[name] = _name_in(modules, name, model.base_model_prefix)
        for name, spec in self.quantization_config.layers.items():
            module = modules.get(self._names[name])
            if module is None:  # the folder's model has a head that this one has not, say
                continue
            if isinstance(weight := getattr(module, "weight", None), torch.Tensor):
                spec = spec | {"dtype": str(weight.dtype).removeprefix("torch.")}
            if "tied_to" in spec:
                spec = spec | {"tied_to": self._names.get(spec["tied_to"])}
            specs[self._names[name]] = spec
        try:
            build_layers_(model, specs)
        except ValueError as error:
            raise FormatError(f"quantization_config: {error}") from None
        self.quantization_config.layers = specs
        self._names = {file: name for file, name in self._names.items() if name in specs}
        for name, spec in specs.items():
            if "tied_to" in spec:  # stored with the other: none that transformers would miss
                layer = model.get_submodule(name)
                layer._buffers.update(dict.fromkeys(layer._buffers))
        self._hide_ties(model)

    def _plan(self, model) -> None:
        for target, source in model.all_tied_weights_keys.items():  # transformers ties at the end
            module, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter_or_buffer(source))
        plan, left = convert._plan(model, self.quantization_config.settings, None, meta=True)
        for x in left:
            setattr(x.module, convert.LEFT_ALONE, x.reason)
        for group in plan:
            self._groups |= {f"{name}.weight": group for name, _ in group.layers}
        self._places = convert._places(model)

    def _hide_ties(self, model) -> None:
        """Takes tied packed layers from transformers' table while it loads: it ties parameters."""
        for target, source in list(model.all_tied_weights_keys.items()):
            if isinstance(model.get_submodule(target.rpartition(".")[0]), PackedModule):
                self._ties[target] = source
                del model.all_tied_weights_keys[target]

    # While loading.

    def get_weight_conversions(self):
        from transformers.core_model_loading import WeightRenaming

        if not self.pre_quantized or not self._names:
            return []
        modules = "|".join(map(re.escape, self._names))
        return [WeightRenaming(rf"^({modules})\.weight$", r"\1.codes")]

    def get_new_dtype(self, converter, param, dtype):
        module, _, part = converter.target_patterns[0].rpartition(".")
        packed = part in FILE_PARTS and module in self.quantization_config.layers
        return None if packed else super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return param_name in self._groups

    def get_quantize_ops(self):
        return _Quantize(self)

    # After loading.

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, spec in self.quantization_config.layers.items():
            layer = model.get_submodule(name)
            if "tied_to" in spec:
                layer._buffers.update(model.get_submodule(spec["tied_to"])._buffers)
            _check(name, layer)
        model.all_tied_weights_keys |= self._ties
        convert._tell_parents(model)
        return model

    # Saving, and the rest of a model's life.

    def get_state_dict_and_metadata(self, model):
        specs, state = layer_specs(model), model.state_dict()
        for name, spec in specs.items():
            for part, file_part in FILE_PARTS.items():
                tensor = state.pop(f"{name}.{part}", None)
                if tensor is not None and "tied_to" not in spec:
                    state[f"{name}.{file_part}"] = tensor
        model.config.quantization_config = MemlmConfig(layers=specs)
        model._weight_conversions = []  # the file's names are the modules', whatever was loaded
        return state, {}

    def _dequantize(self, model, dtype=None):
        return dequantize_(model, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters around the layers

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize:
    """What transformers runs on each weight that is to be quantised, as soon as it is read."""

    def __init__(self, quantizer: MemlmQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict, model=None, missing_keys=None, **kwargs) -> dict:
        """Puts packed layers in the place of those that hold the weight; returns what is left to
        set: nothing, for a weight."""
        rest = {}
        for name, tensor in input_dict.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            group = self.quantizer._groups.get(name)
            if group is None:
                rest[name] = tensor
            elif group.layers:
                self._replace(model, group, name, tensor, missing_keys)
            else:  # its group was replaced when another's weight was read
                self._compare(model.get_submodule(name.rpartition(".")[0]), name, tensor)
        return rest

    def _replace(self, model, group, name: str, tensor, missing_keys: set[str]) -> None:
        weight = nn.Parameter(tensor, requires_grad=False)
        for other, layer in group.layers:
            if layer.weight.shape != weight.shape:
                got, expected = list(weight.shape), list(layer.weight.shape)
                raise ValueError(f"{name}: got shape {got}, the model's is {expected}")
            layer.weight = weight
            missing_keys.discard(f"{other}.weight")
        quantizer = self.quantizer
        mode = quantizer.quantization_config.settings.mode
        for _ in convert._replace(group, mode, quantizer._places):
            pass
        if quantizer._in_files:
            release(tensor)
        convert._tell_parents(model)
        quantizer._hide_ties(model)

    def _compare(self, layer: PackedModule, name: str, tensor) -> None:
        again = pack_weight(tensor, layer.format).tensors()
        if not all(torch.equal(again[part], mine) for part, mine in layer.packed.tensors().items()):
            raise ValueError(
                f"{name}: the config ties it to another weight, but the file holds another value for "
                "it; pass tie_word_embeddings=False"
            )


def _name_in(modules: dict[str, nn.Module], name: str, prefix: str) -> str:
    """The module ``name`` of a file in a model that has the base model's prefix or has it not."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in modules:
            return candidate
    return name


def _check(name: str, layer: PackedModule) -> None:
    """Raises FormatError for a layer that lacks a tensor or holds one of another kind; transformers
    fills what is missing with something."""
    for part, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not getattr(tensor, "_is_hf_initialized", False):
            raise FormatError(f"{name}: the file has no {FILE_PARTS.get(part, part)} for it")
    try:
        layer.packed
        if layer.order is not None:
            check_order(layer.order, layer.k)
    except ValueError as error:
        raise FormatError(f"{name}: {error}") from None


def follow(model: nn.Module) -> None:
    """Tells the transformers models in ``model`` whether they hold packed layers, after some were
    put in or taken out: ``save_pretrained`` asks their quantizer what to write."""
    from transformers.modeling_utils import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        packed = any(isinstance(layer, PackedModule) for layer in module.modules())
        quantizer = getattr(module, "hf_quantizer", None)
        if packed and quantizer is None:
            module.hf_quantizer = MemlmQuantizer(MemlmConfig())
        elif not packed and isinstance(quantizer, MemlmQuantizer):
            quantizer.remove_quantization_config(module)
