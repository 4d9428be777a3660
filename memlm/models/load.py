"""Models from files and back.

A packed model is a folder:

    config.json             the model's config as Hugging Face has it, with
                            "quantization_config": {"quant_method": "memlm", "version": 1,
                                                    "layers": {name: spec}}   (memlm.layer_specs;
                            empty for a float model)
    model.safetensors       every tensor once, under this library's names
    tokenizer.json, tokenizer_config.json       where the model has a tokenizer

Loading one builds the modules without storage and gives them the mapped tensors: nothing is
repacked, nothing copied.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from memlm import formats
from memlm.convert import build_layers_, layer_specs
from memlm.errors import FormatError
from memlm.io import safetensors
from memlm.io.checkpoint import Checkpoint, open_checkpoint
from memlm.io.huggingface import read_json
from memlm.io.tokenizer import load_tokenizer
from memlm.layers import PackedModule
from memlm.models.decoder import Decoder, DecoderConfig
from memlm.models.encoder import Encoder, EncoderConfig

QUANT_METHOD = "memlm"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


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
    progress: Callable[[int, int, str], None] | None = None,
) -> Decoder | Encoder:
    """The model of a packed memlm folder, a Hugging Face folder (safetensors, sharded or not), or
    a GGUF file, in eval mode and with its ``tokenizer`` (None where there is none).

    ``dtype`` is that of the float weights: f32, bf16 or f16; None takes the file's (f32 for
    GGUF's quantised types, and where a file mixes several).  Tensors are mapped where the file
    holds them as they are needed; the rest is converted one tensor at a time.

    Raises FileNotFoundError, FormatError for files that are malformed, not known, or hold tensors
    that the model would not use; TypeError for another ``dtype``.
    """
    path = Path(path)
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype: got {dtype}, accepted are {FLOATS}")
    checkpoint = open_checkpoint(path)
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        model = _load_float(checkpoint, dtype, progress)
    else:
        model = _load_packed(path, checkpoint, quantization)
        if dtype is not None:
            model.to(dtype)
    model.hf_config = checkpoint.config
    if path.is_file() or (path / "tokenizer.json").exists():
        model.tokenizer = _LazyTokenizer(path)
    return model.eval()


def _load_float(checkpoint: Checkpoint, dtype, progress) -> Decoder | Encoder:
    model = build(checkpoint.config)
    wanted, names = model.hf_tensors(), set(checkpoint.names())
    # Hugging Face saves an encoder that has a head under a prefix, a bare one without.
    prefix = "bert." if any(name.startswith("bert.") for name in names) else ""
    used = {prefix + source for sources in wanted.values() for source in sources}
    if missing := sorted(used - names):
        raise FormatError(f"checkpoint: has no tensor {missing[0]!r}")
    tied = isinstance(model, Decoder) and model.config.tied
    for name in sorted(names - used):
        if not (model.hf_ignored.fullmatch(name.removeprefix(prefix)) or
                (tied and name == "lm_head.weight")):  # fmt: skip
            raise FormatError(f"checkpoint: tensor {name!r} is not known in this kind of model")
    state = {}
    for done, (name, sources) in enumerate(wanted.items(), 1):
        columns = tuple(model.get_parameter(name).shape[1:])
        parts = []
        for source, rows in sources.items():
            part = checkpoint.tensor(prefix + source)
            if tuple(part.shape) != (rows, *columns):
                raise FormatError(
                    f"checkpoint: {prefix + source}: got shape {list(part.shape)}, the config "
                    f"says {[rows, *columns]}"
                )
            if not part.is_floating_point():
                raise FormatError(
                    f"checkpoint: {prefix + source}: {part.dtype} is not a float type"
                )
            parts.append(part)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[name] = tensor.to(dtype) if dtype else tensor
        if progress:
            progress(done, len(wanted), name)
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        for name in state:  # one at a time: the old tensor goes as the new one comes
            state[name] = state[name].to(torch.float32)
    _assign(model, state, "checkpoint")
    return model


def _is_packed(quantization) -> bool:
    """Whether a config's ``quantization_config`` is this library's."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _load_packed(path: Path, checkpoint: Checkpoint, quantization) -> Decoder | Encoder:
    where = f"{path / CONFIG_FILE}: quantization_config"
    if not _is_packed(quantization):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise FormatError(f"{where}: quant_method {method!r} is not read here; known is 'memlm'")
    if quantization.get("version") != formats.VERSION:
        raise FormatError(
            f"{where}: version {quantization.get('version')!r}; known is {formats.VERSION}"
        )
    specs = quantization.get("layers")
    if not isinstance(specs, dict) or not all(isinstance(s, dict) for s in specs.values()):
        raise FormatError(f"{where}: layers is missing or malformed")
    model = build(checkpoint.config)
    try:
        build_layers_(model, specs)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None
    state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    for tied, owner in _tied_parts(model, specs):
        if owner in state:  # a missing one is reported with all others
            state[tied] = state[owner]
    _assign(model, state, path / WEIGHTS_FILE)
    return model


def _tied_parts(model: nn.Module, specs: dict[str, dict]) -> list[tuple[str, str]]:
    """(name, name of its owner's) of the packed tensors that are stored with another layer."""
    return [
        (f"{name}.{part}", f"{spec['tied_to']}.{part}")
        for name, spec in specs.items()
        if "tied_to" in spec
        for part in model.get_submodule(name).packed.tensors()
    ]


def _tied_head(model: nn.Module) -> bool:
    """Whether the decoder's float head is its float embedding."""
    return isinstance(model, Decoder) and (
        model.lm_head._parameters.get("weight") is not None
        and model.lm_head._parameters["weight"] is model.embed_tokens._parameters.get("weight")
    )


def _assign(model: nn.Module, state: dict[str, torch.Tensor], where) -> None:
    """Gives the model these tensors, without copying; a tied head stays tied.  Raises FormatError
    naming the tensor that is missing, too many, or not what the model needs."""
    tied = _tied_head(model)
    if tied and "embed_tokens.weight" in state:
        state = {**state, "lm_head.weight": state["embed_tokens.weight"]}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in state and state[name].dtype not in FLOATS:
            raise FormatError(f"{where}: {name}: {state[name].dtype}, expected one of {FLOATS}")
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{where}: {error}") from None
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            try:
                module.packed
            except FormatError as error:
                raise FormatError(f"{where}: {name}: {error}") from None


def save(model: Decoder | Encoder, folder: str | Path) -> dict[str, int]:
    """Writes the model to ``folder``, which :func:`load` maps: packed layers as they are, float
    weights in their dtype, the tokenizer.  Returns file name -> bytes of what was written.

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
    _check_target(folder)
    specs, state = layer_specs(model), model.state_dict()
    for name, _ in _tied_parts(model, specs):
        del state[name]
    if _tied_head(model):
        del state["lm_head.weight"]
    config = {
        **{key: value for key, value in model.hf_config.items() if key != "torch_dtype"},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "version": formats.VERSION,
            "layers": specs,
        },
    }
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder))
    try:
        metadata = {"format": QUANT_METHOD, "version": str(formats.VERSION)}
        safetensors.write(temporary / WEIGHTS_FILE, state, metadata)
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (temporary / CONFIG_FILE).write_text(text, "utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        # Weights first: a config never describes weights that are not there yet.
        for name in sorted(files, key=lambda name: name != WEIGHTS_FILE):
            os.replace(temporary / name, folder / name)
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def _check_target(folder: Path) -> None:
    """Raises FileExistsError unless ``folder`` is absent, empty, or a packed model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: exists, and is no folder")
    if not any(folder.iterdir()):
        return
    config = folder / CONFIG_FILE
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    if not _is_packed(quantization):
        raise FileExistsError(f"{folder}: holds something else than a packed memlm model")
