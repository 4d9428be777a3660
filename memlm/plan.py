"""How much memory a model will take, from its config alone.

Everything here is arithmetic on sizes: nothing is loaded.  What is predicted is the peak of the
memory that :mod:`memlm.workload` holds at once: for each moment of the work that can be the peak,
the sum of the tensors that are alive then, as the forward functions in memlm/models and what
autograd keeps of them say.

Two things are not arithmetic.  What Python, torch and its libraries take by themselves depends on
their builds and the CPU, so :func:`base` measures it, with a tiny model in a process of its own.
And glibc's malloc by default keeps freed blocks of up to 32 MB, in which later tensors leave holes:
a process takes what is predicted after :func:`memlm.memory.return_freed`, and more without it
(docs/memory.md has both).
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import nn

from memlm import cpu, formats, optim, sparse_formats
from memlm._format import Format, SparseFormat, parse_format
from memlm.io.checkpoint import open_checkpoint
from memlm.io.files import read_json
from memlm.kv_formats import KvFormat
from memlm.models.decoder import Decoder, Rotary
from memlm.models.encoder import Encoder
from memlm.models.load import build
from memlm.ops import mode_for
from memlm.ops._matmul import GRAD_ROWS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAIN = ("full", "lora")
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd", "adafactor")
PARTS = (
    "base", "weights", "kv_cache", "gradients", "optimizer", "activations", "logits", "temporary",
)  # fmt: skip
FORMATS = ("float32", "bfloat16", "int8", "int4")  # considered, the most precise first
MIN_CONTEXT = 256  # tokens: a context that was asked for is not halved below
F32 = 4  # bytes
BLOCK_TOKENS = 64  # of the cache that a decoder makes (memlm/kv_cache.py)
# What oneDNN keeps of each shape of bf16 product, once forward, once with the two of its gradients:
# generated code and buffers.  Found by multiplying (0.5 to 1.0 and 1.6 to 2.6 MB, torch 2.13, AMX).
PRIMITIVE, PRIMITIVES = 700_000, 2_000_000


@dataclass(frozen=True)
class Settings:
    """What to run.

    format: of linear layers: ``"float32"``, ``"bfloat16"`` or a packed format (memlm.formats), also
        a sparse one (memlm.sparse_formats) of layers that have been pruned to ``sparsity``, the
        share of their zeros.
    embedding: of embeddings and the head, where linear layers are packed: a packed format, or
        ``"float"``.
    dtype: of activations and float tensors, where linear layers are packed: ``"float32"`` or
        ``"bfloat16"``.
    context: tokens of each of ``batch`` sequences.
    prompt: how many of them are computed at once when a decoder infers, before the others follow
        one by one (None: all).
    train: None to infer, ``"full"`` to train all weights, ``"lora"`` for adapters of ``rank``
        around the frozen linear layers.
    optimizer: ``"adamw"``, ``"sgd"`` (without momentum), ``"adafactor"``, as in torch.optim;
        ``"adamw_8bit"``: memlm.optim.AdamW8bit.
    checkpoint: whether each layer keeps only its input and is computed again for its gradient.
    """

    context: int
    batch: int = 1
    format: str = "float32"
    embedding: str = "int8"
    dtype: str = "float32"
    prompt: int | None = None
    train: str | None = None
    optimizer: str = "adamw"
    checkpoint: bool = False
    rank: int = 16
    sparsity: float = 0.5

    def __post_init__(self):
        for name in ("context", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, at least 1")
        if self.prompt is not None and not 1 <= self.prompt <= self.context:
            raise ValueError(f"prompt: got {self.prompt}, accepted are 1 to {self.context}")
        for name, known in (("train", (None, *TRAIN)), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, accepted are {known}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, accepted are {', '.join(DTYPES)}")
        for name, floats in (("format", DTYPES), ("embedding", ("float",))):
            if getattr(self, name) not in floats:
                parse = parse_format if name == "format" else Format.parse
                parse(getattr(self, name))
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: got {self.sparsity}, accepted is 0 to 1")
        if self.train and "/" in self.format:
            raise ValueError(f"format: got {self.format!r}; training is predicted for dense ones")
        if self.train == "full" and self.packed:
            raise ValueError(f"format: got {self.format!r}, packed weights are frozen: train lora")

    @property
    def packed(self) -> bool:
        return self.format not in DTYPES

    @property
    def floats(self) -> torch.dtype:
        """The type of activations and of the tensors that are not packed."""
        return DTYPES[self.dtype if self.packed else self.format]


@dataclass(frozen=True)
class Prediction:
    """``moments``: name -> bytes by part (some of ``PARTS``) of each moment that could be the peak;
    ``parts`` are those of the peak."""

    settings: Settings
    moments: dict[str, dict[str, int]]

    @property
    def peak(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        return {part: self.moments[self.peak].get(part, 0) for part in PARTS}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict:
        return {
            "settings": asdict(self.settings),
            "peak": self.peak,
            "total": self.total,
            "parts": self.parts,
        }


def predict(config: dict, settings: Settings, base: int = 0) -> Prediction:
    """What the model of a Hugging Face ``config`` takes; ``base`` is what :func:`base` said.

    Raises FormatError for a config that is not known, ValueError for a context beyond the model's
    positions.
    """
    return _predict(build(config), settings, base)


def _predict(model: Decoder | Encoder, settings: Settings, base: int) -> Prediction:
    if settings.context > model.config.max_positions:
        raise ValueError(
            f"context: got {settings.context}, the model takes {model.config.max_positions} tokens"
        )
    kind = _DecoderMemory if isinstance(model, Decoder) else _EncoderMemory
    memory = kind(model, settings)
    moments = memory.training() if settings.train else memory.inference()
    fixed = {"base": base, "weights": memory.weights}
    for parts in moments.values():
        parts["temporary"] = parts.get("temporary", 0) + memory.primitives
    return Prediction(settings, {name: {**fixed, **parts} for name, parts in moments.items()})


@dataclass(frozen=True)
class Advice:
    """``tried``: what was asked for, in every format (and, to train, with and without
    checkpointing); ``chosen``: the best that fits ``ram`` bytes, None where nothing does;
    ``smallest``: the least that was considered."""

    ram: int
    tried: list[Prediction]
    chosen: Prediction | None
    smallest: Prediction

    def to_dict(self) -> dict:
        return {
            "ram": self.ram,
            "tried": [x.to_dict() for x in self.tried],
            "chosen": self.chosen and self.chosen.to_dict(),
            "smallest": self.smallest.to_dict(),
        }


def recommend(
    config: dict,
    settings: Settings,
    ram: int,
    formats: Sequence[str] = FORMATS,
    base: int = 0,
) -> Advice:
    """The best settings that fit.  What was asked for is given up in this order, the last first:
    the context, the batch (both by halves), the precision of the weights (``formats``, the most
    wanted first), and, to train, the speed of keeping all activations.

    Raises what :class:`Settings` and :func:`predict` raise.
    """
    model = build(config)
    if settings.train == "full":
        formats = [f for f in formats if f in DTYPES]
    if not formats:
        raise ValueError("format: packed weights are frozen: give a float one, or train lora")
    either = settings.train and not settings.checkpoint
    checkpoints = (False, True) if either else (settings.checkpoint,)
    asked = [
        replace(settings, format=format, checkpoint=checkpoint)
        for format in formats
        for checkpoint in checkpoints
    ]
    tried = [_predict(model, each, base) for each in asked]
    smallest = min(tried, key=lambda p: p.total)
    for context in _halves(settings.context, MIN_CONTEXT):
        prompt = settings.prompt and min(settings.prompt, context)
        for batch in _halves(settings.batch, 1):
            for each in asked:
                less = replace(each, context=context, batch=batch, prompt=prompt)
                found = _predict(model, less, base)
                smallest = min(smallest, found, key=lambda p: p.total)
                if found.total <= ram:
                    return Advice(ram, tried, found, smallest)
    return Advice(ram, tried, None, smallest)


def _halves(value: int, least: int) -> Iterator[int]:
    yield value
    while value // 2 >= least:
        value //= 2
        yield value


def base(config: dict, settings: Settings) -> int:
    """What a process takes here that has imported all and done the same work with a tiny model of
    the same kind: Python, torch, the code and buffers of its libraries.  Measured in a process of
    its own, in some seconds."""
    code = "import sys; from memlm import workload; print(workload.base(*sys.argv[1:]))"
    kind = "encoder" if isinstance(build(config), Encoder) else "decoder"
    command = [sys.executable, "-c", code, kind, json.dumps(asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"base: {done.stderr.strip()}")
    return int(done.stdout)


def read_config(source: str | Path) -> dict:
    """The Hugging Face config of a model folder, a config.json, or a GGUF file, of whose weights
    nothing is read; or one made of numbers under Hugging Face's names:
    ``"hidden_size=768,num_hidden_layers=12,..."``, a llama unless ``model_type`` is given.

    Raises FileNotFoundError, FormatError, or ValueError for a text that is none of these.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.exists():
        return read_json(path) if path.suffix == ".json" else open_checkpoint(path).config
    if "=" not in str(source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    config = {"model_type": "llama"}
    for item in str(source).split(","):
        key, _, value = item.partition("=")
        config[key.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    return config


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """``"8GB"`` (10^9 bytes), ``"8GiB"`` (2^30), ``"512 MB"``, ``"1e9"``.  ValueError otherwise."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]I?)?B?\s*", text, re.IGNORECASE)
    try:
        value = float(match[1]) * _UNITS[(match[2] or "").upper()]
    except (TypeError, ValueError):
        raise ValueError(f"ram: got {text!r}, accepted are 8GB, 512MB, 16GiB, ...") from None
    return int(value)


class _Memory:
    """What both kinds of model share.  Sizes of activations are in numbers per token, ``rows`` is
    the number of tokens at once, ``e`` the bytes of a number."""

    def __init__(self, model: nn.Module, settings: Settings):
        self.model, self.config, self.settings = model, model.config, settings
        self.e = settings.floats.itemsize
        self.rows = settings.batch * settings.context
        self.lora = settings.train == "lora"

    def _format(self, name: str, module: nn.Module) -> Format | SparseFormat | None:
        """The packed format of a layer, as memlm.quantize_ gives it, or None."""
        if not self.settings.packed or not isinstance(module, (nn.Linear, nn.Embedding)):
            return None
        inner = isinstance(module, nn.Linear) and name != "lm_head"
        spec = self.settings.format if inner else self.settings.embedding
        return None if spec == "float" else parse_format(spec)

    @cached_property
    def parameters(self) -> list[tuple[int, ...]]:
        """The shapes of the model's parameters, shared ones once."""
        return [tuple(p.shape) for p in self.model.parameters()]

    @cached_property
    def adapters(self) -> list[tuple[int, ...]]:
        """Those of LoRA's A [rank, in] and B [out, rank] around the linear layers inside layers."""
        rank = self.settings.rank
        linear = [m for m in self.model.layers.modules() if isinstance(m, nn.Linear)]
        return [s for m in linear for s in ((rank, m.in_features), (m.out_features, rank))]

    @property
    def trained(self) -> list[tuple[int, ...]]:
        return self.adapters if self.lora else self.parameters

    def _packed_bytes(self, format: Format | SparseFormat, n: int, k: int) -> int:
        if isinstance(format, Format):
            parts = formats.layout(format, n, k)
        else:
            stored = sparse_formats.expected(format, n, k, 1 - self.settings.sparsity)
            parts = sparse_formats.layout(format, n, k, stored)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())

    @cached_property
    def weights(self) -> int:
        """Packed weights with the padding that their layout has, float ones in the dtype."""
        total, seen = 0, set()
        for name, module in self.model.named_modules():
            format = self._format(name, module)
            for part, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                if format is not None and part == "weight":
                    total += self._packed_bytes(format, *parameter.shape)
                else:
                    total += parameter.numel() * self.e
        return total + (_numbers(self.adapters) * self.e if self.lora else 0)

    @property
    def gradients(self) -> int:
        return _numbers(self.trained) * self.e

    @property
    def optimizer(self) -> int:
        """States from the first step on, torch's beside a step count of 4 bytes for each parameter."""
        kind, total = self.settings.optimizer, 0
        for shape in self.trained:
            if kind == "adamw":  # the averages of the gradient and of its square
                total += 2 * math.prod(shape) * self.e + F32
            elif kind == "adamw_8bit":
                total += optim.state_bytes(math.prod(shape))
            elif kind == "adafactor":  # of a matrix's squares those of rows and of columns only
                total += (sum(shape) if len(shape) > 1 else math.prod(shape)) * self.e + F32
        return total

    @property
    def step(self) -> int:
        """Temporary tensors of one parameter's step, for the largest: AdamW's square root of the
        average and the quotient made of it; Adafactor's estimate of the squares.  AdamW8bit computes
        in place."""
        largest = max(math.prod(shape) for shape in self.trained)
        kept = {"adamw": 2, "adafactor": 1}.get(self.settings.optimizer, 0)
        return kept * largest * self.e

    def workspace(self, layer: str, module: nn.Module, rows: int) -> int:
        """What a packed layer's kernel copies x to (csrc/cpu/*-inl.h, row_bytes): per number of
        padded x int8 with 8 bytes for each 32 (fast), f32 (accurate), and with AMX's tiles one
        bf16 (fast) or three."""
        format = self._format(layer, module)
        if format is None:
            return 0
        fast = mode_for(format, None) == "fast"
        tiles = 0 < cpu.tile_rows(fast) <= rows
        per_number = {(True, False): 40 / 32, (False, False): 4, (True, True): 2, (False, True): 6}
        return int(rows * format.padded_k(module.in_features) * per_number[fast, tiles])

    @property
    def primitives(self) -> int:
        """What oneDNN keeps for the shapes of a bf16 model's linear layers."""
        if self.e == F32 or self.settings.packed:
            return 0
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        shapes = len({(m.out_features, m.in_features) for m in linear})
        return shapes * (PRIMITIVES if self.settings.train else PRIMITIVE)

    def layer_workspaces(self, rows: int) -> dict[str, int]:
        """Those of the linear layers inside one layer, by their own name."""
        return {
            name.rpartition(".")[2]: self.workspace(name, module, rows)
            for name, module in self.model.layers[0].named_modules()
            if isinstance(module, nn.Linear)
        }

    def training(self) -> dict[str, dict[str, int]]:
        """The moments of a step after the first.  Gradients are dropped before it
        (``zero_grad``); from the last layer to the first, activations go and gradients come, so
        what the two take together is largest at one of the ends."""
        layers, one = self.config.layers, self.saved_by_layer()
        inputs = self.rows * self.config.hidden_size * self.e
        # A checkpointed layer keeps its input; the one at hand is there in full, computed again.
        each, again = (inputs, one - self.shared_input()) if self.settings.checkpoint else (one, 0)
        head = self.head_gradients()
        inner = _numbers([p.shape for p in self.model.layers.parameters()]) * self.e
        inner = self.gradients if self.lora else inner
        activations = layers * each + self.saved_outside()
        moments = {
            f"loss: {name}": {"activations": activations, "logits": logits}
            for name, logits in self.loss_moments().items()
        }
        moments["backward: last layer"] = {
            "activations": layers * each + again,
            "gradients": head,
            "temporary": self.layer_backward(),
        }
        moments["backward: first layer"] = {
            "activations": each + again,
            "gradients": head + inner * (layers - 1) // layers,
            "temporary": self.layer_backward(),
        }
        moments["backward: embedding"] = {
            "gradients": self.gradients,
            "temporary": inputs + (0 if self.lora else self.embedding_backward()),
        }
        moments["step"] = {"gradients": self.gradients, "temporary": self.step}
        return {name: {"optimizer": self.optimizer, **parts} for name, parts in moments.items()}

    def shared_input(self) -> int:
        """What a layer keeps of itself that is its very input: not so where RMSNorm takes a bf16 x
        to f32."""
        shared = isinstance(self.model, Encoder) or self.e == F32
        return self.rows * self.config.hidden_size * self.e if shared else 0

    def down_backward(self) -> int:
        """Around a frozen down_proj: the gradients of its input by way of the adapter and of the
        layer, and their sum, while the input itself is gone.  Before that, of a packed layer,
        GRAD_ROWS dequantised rows of W and the product with their part of the gradient, which is
        added to the sum so far where there are several (memlm/ops/_matmul.py, grad_x)."""
        if not self.lora:
            return 0
        inner = self.rows * self.config.intermediate_size * self.e
        name, layer = next(
            (n, m) for n, m in self.model.layers[0].named_modules() if n.endswith("down_proj")
        )
        if self._format(name, layer) is None:
            return 2 * inner
        n, row = layer.out_features, layer.in_features * self.e
        if n <= GRAD_ROWS:
            return max(2 * inner, n * row + inner)
        # From the second part on: it, the sum so far, and the new sum.
        return min(GRAD_ROWS, n - GRAD_ROWS) * row + 3 * inner


class _DecoderMemory(_Memory):
    """memlm/models/decoder.py."""

    def __init__(self, model: Decoder, settings: Settings):
        super().__init__(model, settings)
        c = self.config
        self.hidden, self.inner, self.vocab = c.hidden_size, c.intermediate_size, c.vocab_size
        self.q = c.heads * c.head_dim
        self.qk = (c.heads + c.kv_heads) * c.head_dim  # what is rotated
        # A new cache as the model makes it: of its keys and values in the dtype.
        self.block = KvFormat("f32" if self.e == F32 else "bf16", BLOCK_TOKENS, c.head_dim)
        self.qkv = (c.heads + 2 * c.kv_heads) * c.head_dim

    def rotary(self, end: int) -> int:
        """Rotary's table: [positions, 3, d / 2], f32."""
        positions = min(self.config.max_positions, max(Rotary.FIRST, 2 * end))
        return positions * self.config.head_dim * 3 // 2 * F32

    def blocks(self, tokens: int) -> int:
        """The cache's blocks of sequences of so many tokens."""
        return self.settings.batch * -(-tokens // self.block.tokens)

    def kv_cache(self, blocks: int) -> int:
        """The pages of the pools that blocks lie in, for the others take no memory.  Each head's
        blocks lie together."""
        c = self.config
        return c.layers * c.kv_heads * -(-blocks * self.block.block_bytes // PAGESIZE) * PAGESIZE

    def inference(self) -> dict[str, dict[str, int]]:
        """The last layer's attention and MLP on the prompt, its logits, and, where tokens follow
        one by one, the last of them and the cache's last growth."""
        s, e = self.settings, self.e
        prompt = s.prompt or s.context
        rows = s.batch * min(prompt, max(1, Decoder.CHUNK // s.batch))
        ws = self.layer_workspaces(rows)
        tables = self.rotary(prompt)
        cache = {"kv_cache": self.kv_cache(self.blocks(prompt))}
        head = s.batch * self.vocab  # of the last position; f32 beside the dtype's
        logits = head * (F32 + (e if e != F32 else 0))
        # All of the last x, of which the last position is a view.
        last = self.hidden * rows * e
        if s.packed and self.inner % formats.TILE_ROWS == 0:
            # All layers are one call (csrc/cpu/decoder.cpp): x, and the workspace of qkv and attended,
            # or of gated in their place; each product's own.
            attention = mlp = last + max(self.qkv + self.q, self.inner) * rows * e
            attention += max(ws["qkv_proj"], ws["o_proj"])
            mlp += max(ws["gate_up_proj"], ws["down_proj"])
        else:
            # x, which Decoder.run holds until the layer returns, and attention's locals.  First
            # rotate: qkv, x cos, x flipped, and their sum.  Then o_proj: qkv, qk, y, and the result
            # (packed), or the product and its sum with the residual.
            rotating = self.hidden + self.qkv + 3 * self.qk
            joining = self.hidden + self.qkv + self.qk + self.q
            joining += (1 if s.packed else 2) * self.hidden
            attention = max(rotating * rows * e, joining * rows * e + ws["o_proj"])
            # x and the attention's result.  Then the normalised x, gate and up, silu(gate), and its
            # product with up.
            mlp = (3 * self.hidden + 4 * self.inner) * rows * e
        moments = {
            "prompt: attention": {**cache, "activations": attention, "temporary": tables},
            "prompt: MLP": {**cache, "activations": mlp, "temporary": tables},
            "prompt: logits": {**cache, "activations": last, "logits": logits, "temporary": tables},
        }
        if prompt < s.context:
            cache = {"kv_cache": self.kv_cache(self.blocks(s.context))}
            tables = self.rotary(s.context)
            moments["last token"] = {**cache, "logits": logits, "temporary": tables}
        # A pool of one layer is copied to one twice as large: both are there for a moment.
        full = self.growth()
        if full:
            pool = self.kv_cache(full) // self.config.layers
            moments["cache growth"] = {"kv_cache": self.kv_cache(full), "temporary": tables + pool}
        return moments

    def growth(self) -> int:
        """How many blocks are full when the pool grows for the last time; 0: it never does."""
        needed = self.blocks(self.settings.context)
        first = self.blocks(min(self.settings.prompt or self.settings.context,
                                max(1, Decoder.CHUNK // self.settings.batch)))  # fmt: skip
        return 1 << (needed - 1).bit_length() - 1 if needed > 1 << (first - 1).bit_length() else 0

    def norm(self) -> int:
        """Bytes per token that RMSNorm keeps: x in f32 and its 1 / rms; the normalised x in f32
        unless the norm's weight is frozen; and its result, which is the next layer's input.  Of an
        f32 model x is the residual stream itself."""
        normalised = 0 if self.lora else F32
        return self.hidden * (F32 + normalised + self.e) + F32

    def saved_by_layer(self) -> int:
        """What autograd keeps of one layer: what its two norms do; qkv for v, the rotated q and k,
        attention's result (o_proj's input too) and log-sum-exp; gate and up, silu(gate), and their
        product, down_proj's input.  Around frozen layers also A x, for B's gradient."""
        numbers = self.qkv + self.qk + self.q + 4 * self.inner
        adapters = 4 * self.settings.rank if self.lora else 0
        per_row = 2 * self.norm() + (numbers + adapters) * self.e + self.config.heads * F32
        return self.rows * per_row

    def saved_outside(self) -> int:
        """The last norm's.  Where the head is frozen nobody needs the norm's result, and a packed
        head's norm is part of the product, which keeps x only.  Nor does the first layer's norm
        keep anything there: its x is a frozen embedding's."""
        if not self.lora:
            return self.rows * self.norm()
        x_in_f32 = self.rows * (self.hidden + 1) * F32
        packed = self._format("lm_head", self.model.lm_head) is not None
        last = self.rows * self.hidden * self.e if packed else x_in_f32
        return last - (0 if self.settings.checkpoint else x_in_f32)

    def loss_moments(self) -> dict[str, int]:
        """Cross entropy over all rows, in f32.  Backward holds the log-probabilities that it kept,
        the gradient of the chosen ones (zero elsewhere), and that of the logits; before, a bf16
        model's logits are there in both types."""
        numbers = self.rows * self.vocab
        forward = 2 * F32 if self.e == F32 else max(2 * F32, F32 + self.e)
        return {"forward": forward * numbers, "backward": 3 * F32 * numbers}

    def head_gradients(self) -> int:
        return 0 if self.lora else self.vocab * self.hidden * self.e

    def layer_backward(self) -> int:
        """In the MLP: the gradient of x that the residual passes by, those of the product of
        silu(gate) and up, of its two factors, and, of what was kept, only the product gone."""
        residual, inner = (n * self.rows * self.e for n in (self.hidden, self.inner))
        return residual + max(2 * inner, self.down_backward())

    def embedding_backward(self) -> int:
        """A tied matrix has two gradients, the head's and the embedding's, before their sum."""
        return self.vocab * self.hidden * self.e if self.config.tied else 0


class _EncoderMemory(_Memory):
    """memlm/models/encoder.py."""

    def inference(self) -> dict[str, dict[str, int]]:
        """x, held until the layer returns, with qkv and y, EncoderLayer.forward's locals.  At the
        end of attention: o_proj's result and its sum with x.  In the MLP: x after attention, and
        up with its gelu; or the gelu with down_proj's result and its sum with x."""
        rows, e, ws = self.rows, self.e, self.layer_workspaces(self.rows)
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        locals_ = (hidden + (3 + 1) * self.config.heads * self.config.head_dim) * rows * e
        attention = 2 * hidden * rows * e + max(ws["qkv_proj"], ws["o_proj"])
        attention += self.config.heads * rows * F32
        up = (hidden + inner) * rows * e + max(inner * rows * e, ws["up_proj"])
        down = (hidden + inner + hidden) * rows * e + max(hidden * rows * e, ws["down_proj"])
        return {
            "attention": {"activations": locals_ + attention},
            "MLP": {"activations": locals_ + max(up, down)},
        }

    def saved_by_layer(self) -> int:
        """What autograd keeps of one layer: x, qkv, attention's result and log-sum-exp, the input
        of the first norm, its result; up, its gelu, the input of the second norm; for each norm
        mean and 1 / deviation.  Around frozen layers also A x, for B's gradient."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        width = self.config.heads * self.config.head_dim
        numbers = (1 + 1 + 1 + 1) * hidden + (3 + 1) * width + 2 * inner
        adapters = 4 * self.settings.rank if self.lora else 0
        per_row = (numbers + adapters + 4) * self.e + self.config.heads * F32
        return self.rows * per_row

    def saved_outside(self) -> int:
        """The input of the embeddings' norm, unless that is frozen."""
        return 0 if self.lora else self.rows * self.config.hidden_size * self.e

    def loss_moments(self) -> dict[str, int]:
        """The batch's similarities: [batch, batch]."""
        return {"backward": 3 * F32 * self.settings.batch**2}

    def head_gradients(self) -> int:
        return 0

    def layer_backward(self) -> int:
        """In the MLP: the gradient of the norm's input in that one's place, and those of gelu and
        up while, of what was kept, only the gelu is gone."""
        return max(self.config.intermediate_size * self.rows * self.e, self.down_backward())

    def embedding_backward(self) -> int:
        return 0


def _numbers(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
