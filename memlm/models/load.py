"""Models from files and back.

A float model's tensors are mapped where the file has them as they are needed.  Matrices that a file
stores in codes (a packed memlm folder, memlm/io/packed_folder.py; GGUF; other libraries' checkpoints)
become packed layers with these codes: mapped from a packed folder, rearranged from the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from memlm.convert import memory_of, spec_of
from memlm.errors import FormatError
from memlm.formats import Packed, joined
from memlm.io import safetensors
from memlm.io.checkpoint import Checkpoint, PackedTensor, open_checkpoint
from memlm.io.packed_folder import (
    CONFIG_FILE, WEIGHTS_FILE, check_target, file_sizes, file_tensors, in_file_order, metadata,
    neighbours, replacing_model, write_config,
)  # fmt: skip
from memlm.io.tokenizer import load_tokenizer
from memlm.layers import Embedding, Linear, PackedModule, Stacked, linear_of
from memlm.layers.packed import split_rows, stack_rows
from memlm.models.decoder import Decoder, DecoderConfig
from memlm.models.encoder import Encoder, EncoderConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _LazyTokenizer:
    """Reads the tokenizer when it is first used: a model is ready without it."""

    def __init__(self, path: Path):
        self._path, self._tokenizer = path, None

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._path)
        return getattr(self._tokenizer, name)


class _NoInit(TorchFunctionMode):
    """Skips ``torch.nn.init``: on the meta device there is nothing to fill, and trying to imports
    torch's compiler, for a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(config: dict) -> Decoder | Encoder:
    """The model of a Hugging Face config, without storage (on the meta device).

    Raises FormatError for a config that neither the decoder nor the encoder knows.
    """
    known = {kind: (c, m) for c, m in ((DecoderConfig, Decoder), (EncoderConfig, Encoder))
             for kind in c.MODEL_TYPES}  # fmt: skip
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise FormatError(f"config: model_type {kind!r}; known are {', '.join(known)}")
    config_type, model_type = known[kind]
    try:
        with torch.device("meta"), _NoInit():
            return model_type(config_type.from_hf(config))
    except RuntimeError as error:  # sizes whose product overflows
        raise FormatError(f"config: {error}") from None


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    pages: str = "mapped",
) -> Decoder | Encoder:
    """The model of a packed memlm folder, a Hugging Face folder (safetensors, sharded or not;
    compressed-tensors, GPTQ and AWQ too), or a GGUF file, in eval mode and with its ``tokenizer``
    (None where there is none).

    ``dtype`` is that of the float weights: f32, bf16 or f16; None takes the file's (f32 where a file
    mixes several).  ``dequantize`` turns what the file holds in codes into floats, too; otherwise
    such matrices stay as they are, to the bit, if one of memlm's formats holds them exactly
    (:func:`memlm.explain` tells which did).  Float tensors and packed folders are mapped; the rest
    is converted one tensor at a time.  ``pages``: how the file lies in memory, ``"mapped"``,
    ``"populated"`` or ``"huge"`` (:mod:`memlm.io.pages`).

    Raises FileNotFoundError, FormatError for files that are malformed, not known, or hold tensors
    that the model would not use; TypeError for another ``dtype``, ValueError for other ``pages``.
    """
    path = Path(path)
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype: got {dtype}, accepted are {FLOATS}")
    checkpoint = open_checkpoint(path, pages)
    model = _assemble(checkpoint, dtype, dequantize, progress)
    model.hf_config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if path.is_file() or (path / "tokenizer.json").exists():
        model.tokenizer = _LazyTokenizer(path)
    return model.eval()


def build_for(checkpoint: Checkpoint) -> Decoder | Encoder:
    """As :func:`build`, for the checkpoint's config.  A config of more layers than the checkpoint has
    tensors is refused before they are built."""
    layers, tensors = checkpoint.config.get("num_hidden_layers"), len(checkpoint.names())
    if isinstance(layers, int) and layers > tensors:
        raise FormatError(f"{checkpoint.path}: {layers} layers, but {tensors} tensors")
    return build(checkpoint.config)


def check_names(model: Decoder | Encoder, checkpoint: Checkpoint) -> str:
    """The prefix that the checkpoint's tensor names have before those of ``model.hf_tensors()``.

    Raises FormatError for one that is missing, and for tensors that the model would not use.
    """
    names = set(checkpoint.names())
    # Hugging Face saves an encoder that has a head under a prefix, a bare one without.
    prefix = "bert." if any(name.startswith("bert.") for name in names) else ""
    used = {prefix + source for sources in model.hf_tensors().values() for source in sources}
    if missing := sorted(used - names):
        raise FormatError(f"{checkpoint.path}: has no tensor {missing[0]!r}")
    tied = isinstance(model, Decoder) and model.config.tied
    for name in sorted(names - used):
        if not (model.hf_ignored.fullmatch(name.removeprefix(prefix)) or
                (tied and name == "lm_head.weight")):  # fmt: skip
            raise FormatError(
                f"{checkpoint.path}: tensor {name!r} is not known in this kind of model"
            )
    return prefix


def other_tensors(
    model: Decoder | Encoder, checkpoint: Checkpoint, prefix: str
) -> dict[str, tuple]:
    """Name -> shape of the float tensors that the checkpoint holds beyond what ``model`` uses: heads
    of encoders.  Other programs look for them."""
    found = {}
    for name in checkpoint.names():
        if model.hf_ignored.fullmatch(name.removeprefix(prefix)):
            tensor = checkpoint.tensor(name)
            if tensor.is_floating_point():
                found[name] = tuple(tensor.shape)
    return found


def read_tensor(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dequantize: bool = False
) -> torch.Tensor | PackedTensor:
    """A tensor as the checkpoint holds it.  Raises FormatError unless it has this shape and holds
    floats or codes."""
    stored = None
    if checkpoint.packs and not dequantize:
        stored = checkpoint.packed(name)
    found = checkpoint.tensor(name) if stored is None else stored
    given = tuple(found.shape) if stored is None else (stored.packed.n, stored.packed.k)
    if given != shape:
        raise FormatError(
            f"{checkpoint.path}: {name}: got shape {list(given)}, the config says {list(shape)}"
        )
    if stored is None and not found.is_floating_point():
        raise FormatError(f"{checkpoint.path}: {name}: {found.dtype} is not a float type")
    return found


def _assemble(checkpoint: Checkpoint, dtype, dequantize: bool, progress) -> Decoder | Encoder:
    model = build_for(checkpoint)
    prefix, wanted = check_names(model, checkpoint), model.hf_tensors()
    state: dict[str, torch.Tensor] = {}
    packed: dict[str, list[torch.Tensor | PackedTensor]] = {}  # by module
    for done, (name, sources) in enumerate(wanted.items(), 1):
        columns = tuple(model.get_parameter(name).shape[1:])
        parts = [
            read_tensor(checkpoint, prefix + source, (rows, *columns), dequantize)
            for source, rows in sources.items()
        ]
        if any(isinstance(part, PackedTensor) for part in parts):
            packed[name.removesuffix(".weight")] = parts
        else:
            tensor = joined(parts)
            state[name] = tensor.to(dtype) if dtype else tensor
        if progress:
            progress(done, len(wanted), name)
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        for name in state:  # one at a time: the old tensor goes as the new one comes
            state[name] = state[name].to(torch.float32)
    float_dtype = dtype or next((tensor.dtype for tensor in state.values()), torch.float32)
    for name, parts in packed.items():
        _put_packed(model, name, parts, float_dtype, state)
    if isinstance(model, Decoder) and model.config.tied and "embed_tokens" in packed:
        (stored,) = packed["embed_tokens"]
        model.lm_head = Linear(stored.packed, None, stored.mode, float_dtype, stored.order)
    _assign(model, state)
    return model


def _put_packed(model: nn.Module, name: str, parts: list, dtype, state: dict) -> None:
    """Packed layers, with bias as the float one has, in the place of ``name``."""
    parent, _, leaf = name.rpartition(".")
    parent, old = model.get_submodule(parent), model.get_submodule(name)
    if isinstance(old, nn.Embedding):
        (stored,) = parts
        check_embedding(name, stored)
        parent._modules[leaf] = Embedding(stored.packed, dtype, old.padding_idx)
        return
    bias = state.pop(f"{name}.bias", None)
    if _is_one_layer(parts):
        order, mode = parts[0].order, parts[0].mode
        whole = stack_rows([part.packed for part in parts])
        parent._modules[leaf] = linear_of(whole, bias, mode, dtype, order)
        return
    rows = [len(p) if isinstance(p, torch.Tensor) else p.packed.n for p in parts]
    biases = [None] * len(parts) if bias is None else bias.split(rows)
    parent._modules[leaf] = Stacked([_layer(*part, dtype) for part in zip(parts, biases)])


def check_embedding(name: str, stored: PackedTensor) -> None:
    """Raises FormatError for a matrix of which no rows can be taken by index."""
    if stored.order is not None:
        raise FormatError(f"{name}: an embedding whose columns have an order")
    if not isinstance(stored.packed, Packed):
        format = stored.packed.format
        raise FormatError(f"{name}: an embedding in {format}, a format of linear layers")


def _is_one_layer(parts: list[torch.Tensor | PackedTensor]) -> bool:
    first = parts[0]
    if not all(isinstance(part, PackedTensor) for part in parts):
        return False
    scales = [p.packed.scales for p in parts]
    kinds = {
        (p.packed.format.name, None if s is None else s.dtype, p.mode)
        for p, s in zip(parts, scales)
    }
    orders = [part.order for part in parts]
    same = all(o is None for o in orders) or (
        all(o is not None and torch.equal(o, first.order) for o in orders)
    )
    return len(kinds) == 1 and same


def _layer(part: torch.Tensor | PackedTensor, bias, dtype) -> nn.Module:
    if isinstance(part, PackedTensor):
        return linear_of(part.packed, bias, part.mode, dtype, part.order)
    layer = nn.Linear(*part.shape[::-1], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(part.to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _tied_head(model: nn.Module) -> bool:
    """Whether the decoder's float head is its float embedding."""
    return isinstance(model, Decoder) and (
        model.lm_head._parameters.get("weight") is not None
        and model.lm_head._parameters["weight"] is model.embed_tokens._parameters.get("weight")
    )


def _assign(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Gives the model these tensors, without copying; a tied head stays tied."""
    tied = _tied_head(model)
    if tied:
        state = {**state, "lm_head.weight": state["embed_tokens.weight"]}
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not empty, empty  # hf_tensors names every tensor of the model


def save(model: Decoder | Encoder, folder: str | Path) -> dict[str, int]:
    """Writes the model to ``folder`` as a packed memlm folder (memlm/io/packed_folder.py), which
    :func:`load` maps and transformers reads: packed layers as they are, float weights in their
    dtype, the tokenizer.  Returns file name -> bytes of what was written.

    Everything is written to a temporary folder inside first and then moved, file by file; other
    files in ``folder`` stay.  A model mapped from ``folder`` may be saved to it.

    Raises TypeError for a model that :func:`load` did not make, FileExistsError for a folder that
    holds something else than a packed model: originals are never overwritten.
    """
    if not isinstance(model, (Decoder, Encoder)) or not hasattr(model, "hf_config"):
        raise TypeError(
            f"model: got {type(model).__name__}, expected what memlm.load returned; for other "
            "modules use torch.save(model.state_dict())"
        )
    folder = Path(folder)
    check_target(folder)
    tensors, specs, tied = hf_state(model)
    config = {**model.hf_config}
    if isinstance(model, Decoder):
        config["tie_word_embeddings"] = tied
    with replacing_model(folder) as temporary:
        ordered = {name: tensors[name] for name in in_file_order(tensors, specs)}
        together = neighbours(ordered, specs)
        safetensors.write(temporary / WEIGHTS_FILE, ordered, metadata(), together=together)
        write_config(temporary / CONFIG_FILE, config, specs, next(model.parameters()).dtype)
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)
        return file_sizes(temporary)


def hf_state(model: Decoder | Encoder) -> tuple[dict[str, torch.Tensor], dict[str, dict], bool]:
    """The model's tensors as a packed folder names them, the specs of its packed layers by Hugging
    Face's module names, and whether the head is tied to the embedding.  Rows of fused layers are
    views of these."""
    tensors: dict[str, torch.Tensor] = {}
    specs: dict[str, dict] = {}
    wanted, tied = model.hf_tensors(), False
    if isinstance(model, Decoder) and model.config.tied:
        head, embedding = model.lm_head, model.embed_tokens
        if isinstance(head, Linear) and isinstance(embedding, Embedding):
            tied = memory_of(head.codes) == memory_of(embedding.codes)
        else:
            tied = _tied_head(model)
        if not tied:
            wanted["lm_head.weight"] = {"lm_head.weight": model.config.vocab_size}
    for name, sources in wanted.items():
        module, _, kind = name.rpartition(".")
        layer = model.get_submodule(module)
        if isinstance(layer, Stacked):
            layers = [
                (one, {source: sources[source]}) for one, source in zip(layer.layers, sources)
            ]
        else:
            layers = [(layer, sources)]
        for layer, sources in layers:
            _add(tensors, specs, layer, kind, sources)
    if tied and isinstance(model.lm_head, Linear):
        (embedding,) = wanted["embed_tokens.weight"]
        owner = embedding.removesuffix(".weight")
        specs["lm_head"] = {**spec_of(model.lm_head), "tied_to": owner}
    return tensors, specs, tied


def _add(tensors: dict, specs: dict, layer: nn.Module, kind: str, sources: dict[str, int]) -> None:
    """Adds one tensor of a layer, under the names of ``sources``, their rows one below the other."""
    rows = list(sources.values())
    if kind != "weight" or not isinstance(layer, PackedModule):
        tensors |= zip(sources, getattr(layer, kind).detach().split(rows))
        return
    for source, packed in zip(sources, split_rows(layer.packed, rows)):
        module = source.removesuffix(".weight")
        tensors |= file_tensors(module, packed, layer.order)
        specs[module] = spec_of(layer, packed)
