"""Models from files and back.

A packed model is a folder:

    config.json             the model's config as Hugging Face has it, with
                            "quantization_config": {"quant_method": "memlm", "version": 1,
                                                    "layers": {name: spec}}   (memlm.layer_specs;
                            none for a float model)
    model.safetensors       every tensor once, under this library's names
    tokenizer.json, tokenizer_config.json

Loading one builds the modules without storage and gives them the mapped tensors: nothing is
repacked, nothing copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from memlm import formats
from memlm.convert import build_layers_, layer_specs
from memlm.errors import FormatError
from memlm.io import safetensors
from memlm.io.checkpoint import Checkpoint, open_checkpoint
from memlm.io.tokenizer import load_tokenizer
from memlm.layers import PackedModule
from memlm.models.decoder import Decoder, DecoderConfig
from memlm.models.encoder import Encoder, EncoderConfig

QUANT_METHOD = "memlm"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS_FILE = "model.safetensors"


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


def build(config: dict) -> Decoder | Encoder:
    """The model of a Hugging Face config, without storage (on the meta device)."""
    with torch.device("meta"):
        if config.get("model_type") == "bert":
            return Encoder(EncoderConfig.from_hf(config))
        return Decoder(DecoderConfig.from_hf(config))


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Decoder | Encoder:
    """The model of a packed memlm folder, a Hugging Face folder (safetensors, sharded or not), or
    a GGUF file, in eval mode and with its ``tokenizer``.

    ``dtype`` is that of the float weights: f32, bf16 or f16; None takes the file's (GGUF's
    quantised types become f32).  Tensors are mapped where the file holds them as they are needed;
    the rest is converted one tensor at a time.

    Raises FileNotFoundError, or FormatError for files that are malformed or not known.
    """
    path = Path(path)
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype: got {dtype}, accepted are {FLOATS}")
    checkpoint = open_checkpoint(path)
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        model = _load_float(checkpoint, dtype, progress)
    else:
        model = _load_packed(path, checkpoint.config, quantization)
        if dtype is not None:
            model.to(dtype)
    model.hf_config = checkpoint.config
    model.tokenizer = _LazyTokenizer(path)
    return model.eval()


def _load_float(checkpoint: Checkpoint, dtype, progress) -> Decoder | Encoder:
    model = build(checkpoint.config)
    wanted, names = model.hf_tensors(), set(checkpoint.names())
    # Hugging Face saves a bare encoder without, and one with a head with, a prefix.
    prefix = "bert." if isinstance(model, Encoder) and any(n.startswith("bert.") for n in names) else ""
    state = {}
    for done, (name, sources) in enumerate(wanted.items(), 1):
        missing = [prefix + s for s in sources if prefix + s not in names]
        if missing:
            raise FormatError(f"checkpoint: has no tensor {missing[0]!r}")
        parts = [checkpoint.tensor(prefix + source) for source in sources]
        if not all(part.is_floating_point() for part in parts):
            raise FormatError(f"checkpoint: {sources[0]}: {parts[0].dtype} is not a float type")
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[name] = tensor.to(dtype) if dtype else tensor
        if progress:
            progress(done, len(wanted), name)
    _assign(model, state)
    return model


def _load_packed(path: Path, config: dict, quantization: dict) -> Decoder | Encoder:
    where = f"{path / 'config.json'}: quantization_config"
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise FormatError(f"{where}: quant_method {method!r} is not read here; known is 'memlm'")
    if quantization.get("version") != formats.VERSION:
        raise FormatError(
            f"{where}: version {quantization.get('version')!r}; known is {formats.VERSION}"
        )
    specs = quantization.get("layers")
    if not isinstance(specs, dict) or not all(isinstance(s, dict) for s in specs.values()):
        raise FormatError(f"{where}: layers is missing or malformed")
    model = build(config)
    try:
        build_layers_(model, specs)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None
    state, _ = safetensors.open_mapped(path / WEIGHTS_FILE)
    for name, spec in specs.items():
        owner = spec.get("tied_to")
        if owner is not None:
            for key in [k for k in state if k.rsplit(".", 1)[0] == owner]:
                state[f"{name}.{key.rsplit('.', 1)[1]}"] = state[key]
    _assign(model, state)
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            try:
                module.packed
            except FormatError as error:
                raise FormatError(f"{path / WEIGHTS_FILE}: {name}: {error}") from None
    return model


def _assign(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Gives the model these tensors, without copying; tied weights stay tied."""
    if isinstance(model, Decoder) and model.config.tied and "embed_tokens.weight" in state:
        state = {**state, "lm_head.weight": state["embed_tokens.weight"]}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise FormatError(f"checkpoint: {error}") from None
    if isinstance(model, Decoder) and model.config.tied and "lm_head.weight" in state:
        if "embed_tokens.weight" in state:
            model.lm_head.weight = model.embed_tokens.weight


def save(model: Decoder | Encoder, folder: str | Path) -> dict[str, int]:
    """Writes the model to ``folder``, which :func:`load` maps: packed layers as they are, float
    weights in their dtype, the tokenizer.  Returns file name -> bytes.

    Atomic: everything is written beside ``folder`` first; an existing folder is replaced only if
    it holds such a model.

    Raises TypeError for a model that :func:`load` did not make, FileExistsError for a folder that
    holds something else.
    """
    if not isinstance(model, (Decoder, Encoder)) or not hasattr(model, "hf_config"):
        raise TypeError(
            f"model: got {type(model).__name__}, expected what memlm.load returned; for other "
            "modules use torch.save(model.state_dict())"
        )
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: exists, and holds no model")
    config = {
        **model.hf_config,
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "version": formats.VERSION,
            "layers": layer_specs(model),
        },
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        safetensors.write(
            temporary / WEIGHTS_FILE, _distinct(model), {"format": "memlm", "version": str(formats.VERSION)}
        )
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (temporary / "config.json").write_text(text, "utf-8")
        model.tokenizer.save(temporary)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def _distinct(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, with tensors that share memory under their first name only."""
    seen, state = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state
