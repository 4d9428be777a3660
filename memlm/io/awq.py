"""Folders of AWQ in AutoAWQ's ``gemm`` layout (arXiv:2306.00978 is the method;
https://github.com/casper-hansen/AutoAWQ the format).

A quantised module has, in place of ``weight [n, k]``,

    qweight   int32 [k, n / 8]: codes along n; from its lowest bits up a word holds those of the
              rows 0, 2, 4, 6, 1, 3, 5, 7 of its eight
    qzeros    int32 [groups, n / 8]: zero points, likewise
    scales    [groups, n] in f16, bf16 or f32

and ``w = scales (q - z)``.
"""

from __future__ import annotations

import torch

from memlm.io.huggingface import Folder
from memlm.io.quantized import DEFAULT_GROUP, Matrix, QuantizedFolder

_BITS = 4
_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight, from the lowest bits up


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 ``[columns, words]`` -> uint8 ``[8 * words, columns]``."""
    packed = packed.T.contiguous()
    codes = packed.new_empty((packed.shape[0], len(_ROWS), packed.shape[1]), dtype=torch.uint8)
    for place, row in enumerate(_ROWS):
        codes[:, row] = packed >> _BITS * place & 15
    return codes.flatten(0, 1)


class AWQ(QuantizedFolder):
    """An AWQ folder as a checkpoint: 4 bits, the gemm layout.

    Raises FormatError for a config or tensors that are malformed, and for other layouts.
    """

    CODES = "qweight"
    REQUIRED = ("qzeros", "scales")

    def __init__(self, folder: Folder):
        super().__init__(folder)
        config = folder.config["quantization_config"]
        self._setting(config, "bits", (_BITS,))
        for key in ("version", "format", "checkpoint_format"):  # AutoAWQ's key, and GPTQModel's
            self._setting(config, key, ("gemm", "GEMM", None))
        if config.get("backend") == "llm-awq":  # whose layout is another
            raise self._error("quantization_config: backend 'llm-awq' is not read here")
        self._group = self._group_size(config, DEFAULT_GROUP)

    def _matrix(self, module: str) -> Matrix:
        qweight = self._part(module, "qweight", 2, torch.int32)
        k, n = qweight.shape[0], qweight.shape[1] * len(_ROWS)
        group = min(self._group or k, k)
        groups = -(-k // group)
        scales = self._scales(module, "scales")
        self._check_shape(module, "scales", scales, groups, n)
        qzeros = self._part(module, "qzeros", 2, torch.int32)
        self._check_shape(module, "qzeros", qzeros, groups, qweight.shape[1])

        def rows(start: int, stop: int) -> torch.Tensor:
            return _unpack(qweight[:, start // len(_ROWS) : stop // len(_ROWS)])

        return Matrix(n, k, _BITS, group, rows, scales.T, _unpack(qzeros), None)
