"""Folders of compressed-tensors in the format ``pack-quantized``
(https://github.com/vllm-project/compressed-tensors), as vLLM and transformers load them.

A quantised module has, in place of ``weight [n, k]``,

    weight_packed       int32 [n, k / (32 / bits)], rounded up: codes q + 2 ** (bits - 1) along k,
                        the first in the lowest bits (:mod:`memlm.io.bits`)
    weight_scale        [n, groups] in f16, bf16 or f32; [n, 1] per channel, [1] per tensor
    weight_zero_point   int32 [n / (32 / bits), groups], rounded up: zero points like codes, along
                        n; or int8 [n, groups], as they are; asymmetric only
    weight_shape        int [2]: n, k
    weight_g_idx        int32 [k]: the group of each column, where they were ordered by activation;
                        -1 throughout: they were not

and ``w = scale (q - zero_point)``.  ``config_groups`` of the config says which schemes there are.
Which one a module follows is told by the shapes of its tensors, so its ``targets``, patterns among
them, are not needed.  What the config says about activations is left to whoever computes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from memlm import formats
from memlm.formats import TILE_ROWS, ZEROS, Packed
from memlm.io import bits as words
from memlm.io import safetensors
from memlm.io.checkpoint import Checkpoint
from memlm.io.huggingface import Folder
from memlm.io.quantized import SCALE_DTYPES, Matrix, QuantizedFolder

FORMAT = "pack-quantized"
_BITS = (4, 8, 2)
_CHUNK = 1 << 22  # weights repacked at a time


@dataclass(frozen=True)
class _Scheme:
    bits: int
    group: int | None  # None: a whole row
    per_tensor: bool
    symmetric: bool
    ordered: bool  # columns by activation

    def columns(self, k: int) -> int:
        """Of a row of k, those that share a scale."""
        return min(self.group or k, k)

    def to_config(self) -> dict:
        """As ``config_groups`` says it."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group,
            "dynamic": False,
        }

    def scale_shape(self, n: int, k: int) -> list[int]:
        return [1] if self.per_tensor else [n, -(-k // self.columns(k))]


class CompressedTensors(QuantizedFolder):
    """A pack-quantized folder as a checkpoint: 2, 4 or 8 bits, by group, channel or tensor.

    Raises FormatError for a config or tensors that are malformed, and for another format, a
    sparse one, or weights that need their activations transformed.
    """

    CODES = "weight_packed"
    REQUIRED = ("weight_scale", "weight_shape")
    OPTIONAL = ("weight_zero_point", "weight_g_idx")

    def __init__(self, folder: Folder):
        super().__init__(folder)
        config = folder.config["quantization_config"]
        # What would change the weights, or what they are multiplied by, if it went unnoticed.
        for key in ("sparsity_config", "transform_config"):
            value = config.get(key)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise self._error(f"quantization_config: {key} {value!r:.80} is not read here")
        self._strings(config, "ignore")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self._error(
                f"quantization_config: config_groups is {groups!r:.80}; expected objects by name"
            )
        self._schemes = self._few({self._scheme(config, group) for group in groups.values()})

    def _strings(self, config: dict, key: str) -> None:
        value = config.get(key)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise self._error(
                f"quantization_config: {key} is {value!r:.80}; expected a list of names"
            )

    def _scheme(self, config: dict, group: dict) -> _Scheme:
        if not isinstance(group, dict):
            raise self._error(
                f"quantization_config: config_groups holds {group!r:.80}; expected an object"
            )
        self._strings(group, "targets")
        if group.get("format") is None:
            self._setting(config, "format", (FORMAT,))
        else:
            self._setting(group, "format", (FORMAT,))
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise self._error(
                f"quantization_config: weights is {weights!r:.80}; expected an object"
            )
        weights = {key: value for key, value in weights.items() if value is not None}
        self._setting(weights, "type", ("int",), "int")
        self._setting(weights, "dynamic", (False,), False)
        size = self._group_size(weights, -1)
        # As compressed-tensors infers it.
        inferred = "group" if size else "channel" if "group_size" in weights else "tensor"
        strategy = self._setting(weights, "strategy", ("group", "channel", "tensor"), inferred)
        if (strategy == "group") != (size is not None):
            raise self._error(
                f"quantization_config: group_size is {weights.get('group_size')!r:.80} for "
                f"strategy {strategy!r}"
            )
        return _Scheme(
            self._setting(weights, "num_bits", _BITS, 8),
            size,
            strategy == "tensor",
            self._setting(weights, "symmetric", (True, False), True),
            weights.get("actorder") in ("group", "dynamic", True),
        )

    def _matrix(self, module: str) -> Matrix:
        has = self._parts[module]
        shape = self._part(module, "weight_shape", 1, torch.int64, torch.int32)
        self._check_shape(module, "weight_shape", shape, 2)
        n, k = shape.tolist()
        packed = self._part(module, "weight_packed", 2, torch.int32)
        if n != packed.shape[0] or k < 1:
            raise self._error(
                f"{module}.weight_shape: got {[n, k]}, weight_packed has {packed.shape[0]} rows"
            )
        scales = self._scales(module, "weight_scale")
        scheme = self._scheme_of(module, n, k, packed, scales)
        bits, group, groups = scheme.bits, scheme.columns(k), -(-k // scheme.columns(k))
        if scheme.per_tensor:
            scales = scales.expand(n, 1)
        zeros = torch.tensor(1 << bits - 1).expand(n, groups)
        if not scheme.symmetric:
            stored = self._part(module, "weight_zero_point", 2, torch.int32, torch.int8)
            packs = stored.dtype == torch.int32  # since version 0.9.4
            rows = words.words(n, bits) if packs else n
            self._check_shape(module, "weight_zero_point", stored, rows, groups)
            zeros = words.unpack(stored.T, bits, n).T if packs else stored + zeros
        g_idx = None
        if "weight_g_idx" in has:
            g_idx = self._part(module, "weight_g_idx", 1, torch.int32, torch.int64)
            g_idx = None if (g_idx == -1).all() else self._g_idx(module, "weight_g_idx", k, groups)
        elif scheme.ordered:
            raise self._error(f"{module}.weight_g_idx: is missing, and actorder is set")

        def codes(start: int, stop: int) -> torch.Tensor:
            return words.unpack(packed[start:stop], bits, k)

        return Matrix(n, k, bits, group, codes, scales, zeros, g_idx)

    def _scheme_of(
        self, module: str, n: int, k: int, packed: torch.Tensor, scales: torch.Tensor
    ) -> _Scheme:
        """The scheme that these tensors fit."""
        has_zeros, schemes = "weight_zero_point" in self._parts[module], self._schemes
        for part, got, wanted in (
            ("weight_packed", list(packed.shape), lambda s: [n, words.words(k, s.bits)]),
            ("weight_scale", list(scales.shape), lambda s: s.scale_shape(n, k)),
            ("weight_zero_point", has_zeros, lambda s: not s.symmetric),
        ):
            fitting = {scheme for scheme in schemes if wanted(scheme) == got}
            if not fitting:
                expected = " or ".join(sorted({str(wanted(scheme)) for scheme in schemes}))
                what = "is there" if got in (True, False) else "got shape"
                raise self._error(
                    f"{module}.{part}: {what}: {got}, by config_groups: {expected} "
                    f"(for {n}x{k} weights)"
                )
            schemes = fitting
        if len({(scheme.bits, scheme.columns(k)) for scheme in schemes}) > 1:
            raise self._error(f"{module}.weight_scale: fits several of config_groups")
        return min(schemes, key=lambda scheme: scheme.ordered)


def write(
    folder: str | Path,
    checkpoint: Checkpoint,
    names: Iterable[str] | None = None,
    floats: Collection[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> list[str]:
    """Writes ``config.json`` and ``model.safetensors`` of a pack-quantized folder, which
    transformers (with the package compressed-tensors) and vLLM load, into an existing ``folder``.

    Matrices that the checkpoint holds in codes keep them, and their scales; one tensor is in memory
    at a time.  transformers turns scales into the config's ``dtype`` when it loads them: what it
    computes with is to the bit this library's for ``float32``.  With compressed-tensors 0.18 to
    0.20 it loads asymmetric matrices with ``CompressedTensorsConfig(dequantize=True)`` only, and
    that where all are of one scheme; with 0.16 and 0.17 any.

    names: the tensors to write.  None: all.
    floats: modules whose weight is dequantised, to the config's ``dtype``: embeddings must be,
        since transformers loads no packed ones.
    progress: called with (done, total, name) after each tensor of the file.

    Returns the names of what was rounded: dequantised weights that the ``dtype`` does not hold.

    Raises ValueError naming the module, before anything is written, for what the format does not
    hold: nf4, an order of columns, and ``w = s q + o`` where ``-o / s`` is no integer from 0 to
    2 ** bits - 1.
    """
    folder, config = Path(folder), dict(checkpoint.config)
    dtype = _float_dtype(config)
    kinds, sources = {}, {}  # by the tensors' names; what they are made from
    schemes, left, rounded = defaultdict(list), [], []
    for name in list(checkpoint.names() if names is None else names):
        module, stored = name.removesuffix(".weight"), checkpoint.packed(name)
        if stored is None or module in floats:
            if stored is None:
                tensor = checkpoint.tensor(name)
                kinds[name] = tensor.dtype, tuple(tensor.shape)
            else:
                kinds[name] = dtype, (stored.packed.n, stored.packed.k)
            sources[name] = (name, "weight")
            if len(kinds[name][1]) == 2 and module != name:
                left.append(module)
        else:
            if stored.order is not None:
                raise ValueError(
                    f"{module}: its columns have an order, which the format does not hold"
                )
            scheme = _scheme_for(module, stored.packed)
            schemes[scheme].append(module)
            _check_zeros(module, stored.packed)
            for part, kind in _kinds(scheme, stored.packed).items():
                kinds[f"{module}.{part}"], sources[f"{module}.{part}"] = kind, (name, part)
        checkpoint.release(name)

    done, last = 0, None

    def read(tensor_name: str) -> torch.Tensor:
        nonlocal done, last
        name, part = sources[tensor_name]
        if last not in (None, name):  # what was read from it is written by now
            checkpoint.release(last)
        last = name
        if part == "weight":
            tensor = checkpoint.tensor(name)
            made = tensor.to(kinds[tensor_name][0])
            if made is not tensor and not torch.equal(made.float(), tensor):
                rounded.append(name)
        else:
            made = _make(checkpoint.packed(name).packed, part)
        done += 1
        if progress:
            progress(done, len(kinds), tensor_name)
        return made

    safetensors.write_each(folder / "model.safetensors", kinds, read, {"format": "pt"})
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": modules, "weights": scheme.to_config(), "format": FORMAT}
            for i, (scheme, modules) in enumerate(schemes.items())
        },
        "ignore": left,
    }
    if not schemes:
        del config["quantization_config"]
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (folder / "config.json").write_text(text, "utf-8")
    return rounded


def _float_dtype(config: dict) -> torch.dtype:
    name = config.get("dtype", config.get("torch_dtype")) or "float32"
    known = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}
    if name not in known:
        raise ValueError(f"config: dtype is {name!r:.80}; accepted are {', '.join(known)}")
    return known[name]


def _scheme_for(module: str, packed: Packed) -> _Scheme:
    format, k = packed.format, packed.k
    if format.codebook == "nf":
        raise ValueError(f"{module}: {format} is not among what the format holds, integers")
    # It wants columns in whole groups: of the largest size that divides both.
    group = None if format.groups(k) == 1 else math.gcd(format.group, k)
    return _Scheme(format.bits, group, False, _zeros(packed) is None, False)


def _check_zeros(module: str, packed: Packed) -> None:
    """Raises ValueError where offsets are no zero points."""
    if packed.format.symmetric:
        return
    scales, offsets = (_by_row(t, packed.n).double() for t in (packed.scales, packed.offsets))
    zeros = _zeros(packed)
    off = (offsets + scales * (1 << packed.format.bits - 1 if zeros is None else zeros)).abs()
    worst = float(off.max())
    if worst:
        steps = float((off / scales.abs()).nan_to_num(0, posinf=math.inf).max())
        raise ValueError(
            f"{module}: {packed.format} has offsets that are no integer zero points times their "
            f"scales, which is all that compressed-tensors holds; rounding them would move weights "
            f"by up to {worst:.3g}, {steps:.3g} of a step"
        )


def _kinds(scheme: _Scheme, packed: Packed) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of the tensors of a matrix."""
    n, k, bits = packed.n, packed.k, scheme.bits
    scale_shape = tuple(scheme.scale_shape(n, k))
    kinds = {
        "weight_packed": (torch.int32, (n, words.words(k, bits))),
        "weight_scale": (packed.scales.dtype, scale_shape),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        kinds["weight_zero_point"] = (torch.int32, (words.words(n, bits), scale_shape[1]))
    return kinds


def _make(packed: Packed, part: str) -> torch.Tensor:
    """One of a matrix's tensors."""
    bits, n, k = packed.format.bits, packed.n, packed.k
    if part == "weight_shape":
        return torch.tensor([n, k])
    if part == "weight_packed":
        rows = max(_CHUNK // k // TILE_ROWS, 1) * TILE_ROWS
        sizes = [min(rows, n - start) for start in range(0, n, rows)]
        codes = torch.empty(n, words.words(k, bits), dtype=torch.int32)
        for out, chunk in zip(codes.split(sizes), formats.split_rows(packed, sizes)):
            q = formats.unpack(chunk)[0]
            out.copy_(words.pack(q.view(torch.uint8) ^ 128 if bits == 8 else q, bits))  # q + 128
        return codes
    by_group = _by_row(packed.scales, n) if part == "weight_scale" else _zeros(packed)
    groups = packed.format.groups(k)
    if groups > 1:  # as in _scheme_for
        group = math.gcd(packed.format.group, k)
        by_group = by_group.repeat_interleave(packed.format.group // group, 1)[:, : k // group]
    return by_group if part == "weight_scale" else words.pack(by_group.T, bits).T


def _zeros(packed: Packed) -> torch.Tensor | None:
    """uint8 ``[n, groups]``, the codes nearest to what stands for 0; None where that is the middle
    throughout, as the format's symmetric schemes have it."""
    bits, middle = packed.format.bits, 1 << packed.format.bits - 1
    scales = _by_row(packed.scales, packed.n)
    if packed.format.symmetric:
        zero = ZEROS[bits] + (128 if bits == 8 else 0)
        return None if zero == middle else torch.full_like(scales, zero, dtype=torch.uint8)
    exact = -_by_row(packed.offsets, packed.n).double() / scales.double()
    zeros = exact.nan_to_num(0).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    return None if (zeros == middle).all() else zeros


def _by_row(tiled: torch.Tensor, n: int) -> torch.Tensor:
    """``[tiles, groups, 16]`` -> ``[n, groups]``."""
    return tiled.transpose(1, 2).flatten(0, 1)[:n]
