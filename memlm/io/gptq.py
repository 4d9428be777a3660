"""Folders of GPTQ as AutoGPTQ and GPTQModel write them (arXiv:2210.17323 is the method;
https://github.com/ModelCloud/GPTQModel the format).

A quantised module has, in place of ``weight [n, k]``,

    qweight   int32 [k / (32 / bits), n]: codes along k, the first in the lowest bits
    qzeros    int32 [groups, n / (32 / bits)]: zero points along n, likewise
    scales    [groups, n] in f16, bf16 or f32
    g_idx     int32 [k]: the group of each column (out of order with ``desc_act``)

and ``w = scales (q - z)``.  ``checkpoint_format`` says what qzeros holds: ``gptq_v2`` z itself,
``gptq`` (and none) z - 1, so that z is 1 to 2 ** bits there.
"""

from __future__ import annotations

import torch

from memlm.io import bits as words
from memlm.io.huggingface import Folder
from memlm.io.quantized import DEFAULT_GROUP, Matrix, QuantizedFolder

_BITS = (4, 8, 2)
_STORED_LESS = {"gptq": 1, "gptq_v2": 0}


class GPTQ(QuantizedFolder):
    """A GPTQ folder as a checkpoint: 2, 4 or 8 bits, in any order of columns.

    Raises FormatError for a config or tensors that are malformed, and for other bits and formats.
    """

    CODES = "qweight"
    REQUIRED = ("qzeros", "scales")
    OPTIONAL = ("g_idx",)

    def __init__(self, folder: Folder):
        super().__init__(folder)
        config = folder.config["quantization_config"]
        formats = {  # both keys are in use
            self._setting(config, key, tuple(_STORED_LESS))
            for key in ("checkpoint_format", "format")
            if config.get(key) is not None
        } or {"gptq"}
        if len(formats) > 1:
            raise self._error("quantization_config: format and checkpoint_format differ")
        self._stored_less = _STORED_LESS[formats.pop()]
        self._setting(config, "pack_dtype", ("int32",), "int32")
        self._setting(config, "is_marlin_format", (False,), False)
        self._ordered = self._setting(config, "desc_act", (False, True), False)
        # Settings of single modules, by pattern; shapes tell which of them a module has.
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict) or not all(isinstance(d, dict) for d in dynamic.values()):
            raise self._error(
                f"quantization_config: dynamic is {dynamic!r:.80}; expected objects by pattern"
            )
        schemes = set()
        for overrides in ({}, *dynamic.values()):
            settings = {**config, **overrides}
            self._setting(settings, "pack_dtype", ("int32",), "int32")
            bits = self._setting(settings, "bits", _BITS)
            schemes.add((bits, self._group_size(settings, DEFAULT_GROUP)))
        self._schemes = self._few(schemes)

    def _matrix(self, module: str) -> Matrix:
        qweight = self._part(module, "qweight", 2, torch.int32)
        scales = self._scales(module, "scales", 2)
        qzeros = self._part(module, "qzeros", 2, torch.int32)
        groups, n = scales.shape
        if qweight.shape[1] != n:
            raise self._error(
                f"{module}.scales: got shape {[groups, n]}, qweight has {qweight.shape[1]} columns"
            )
        fitting = set()
        for bits, size in self._schemes:
            k = qweight.shape[0] * words.WORD // bits
            group = min(size or k, k)
            shape = (-(-k // group), words.words(n, bits))
            if groups == shape[0] and tuple(qzeros.shape) == shape and n * bits % words.WORD == 0:
                fitting.add((bits, k, group))
        if len(fitting) != 1:
            raise self._error(
                f"{module}.qzeros: got shape {list(qzeros.shape)}, which beside qweight "
                f"{list(qweight.shape)} and scales {[groups, n]} fits {len(fitting) or 'none'} of "
                f"the (bits, group_size) {sorted(self._schemes, key=str)}"
            )
        bits, k, group = fitting.pop()
        g_idx = None
        if "g_idx" in self._parts[module]:
            g_idx = self._g_idx(module, "g_idx", k, groups)
        elif self._ordered:
            raise self._error(f"{module}.g_idx: is missing, and desc_act is set")
        zeros = words.unpack(qzeros, bits, n).T.int() + self._stored_less

        def rows(start: int, stop: int) -> torch.Tensor:
            return words.unpack(qweight[:, start:stop].T, bits, k)

        return Matrix(n, k, bits, group, rows, scales.T, zeros, g_idx)
