"""Folders of compressed-tensors in the format ``pack-quantized``
(https://github.com/vllm-project/compressed-tensors), as vLLM and transformers load them.

A quantised module has, in place of ``weight [n, k]``,

    weight_packed       int32 [n, k / (32 / bits)], rounded up: codes q + 2 ** (bits - 1) along k,
                        the first in the lowest bits (:mod:`memlm.io.bits`)
    weight_scale        [n, groups] in f16, bf16 or f32; [n, 1] per channel, [1] per tensor
    weight_zero_point   int32 [n / (32 / bits), groups], rounded up: zero points like codes, along
                        n; asymmetric only
    weight_shape        int [2]: n, k
    weight_g_idx        int32 [k]: the group of each column, where they were ordered by activation;
                        -1 throughout: they were not

and ``w = scale (q - zero_point)``.  ``config_groups`` of the config says which schemes there are.
Which one a module follows is told by the shapes of its tensors, so its ``targets``, patterns among
them, are not needed.  What the config says about activations is left to whoever computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memlm.io import bits as words
from memlm.io.huggingface import Folder
from memlm.io.quantized import Matrix, QuantizedFolder

FORMAT = "pack-quantized"
_BITS = (4, 8, 2)


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
        self._setting(config, "quantization_status", ("compressed",))
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
        self._schemes = {self._scheme(config, group) for group in groups.values()}

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
            zeros = self._part(module, "weight_zero_point", 2, torch.int32)
            self._check_shape(module, "weight_zero_point", zeros, words.words(n, bits), groups)
            zeros = words.unpack(zeros.T, bits, n).T
        g_idx = None
        if "weight_g_idx" in has:
            g_idx = self._part(module, "weight_g_idx", 1, torch.int32, torch.int64)
            g_idx = None if (g_idx == -1).all() else self._g_idx(module, "weight_g_idx", k, groups)
        elif scheme.ordered:
            raise self._error(f"{module}.weight_g_idx: is missing, and actorder is set")

        def rows(start: int, stop: int) -> torch.Tensor:
            return words.unpack(packed[start:stop], bits, k)

        return Matrix(n, k, bits, group, rows, scales, zeros, g_idx)

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
