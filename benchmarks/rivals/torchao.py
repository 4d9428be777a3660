"""torchao: 4-bit weights (asymmetric, groups of 32), 8-bit weights, and 8-bit weights with a scale for
each row of x; in bf16, which its CPU paths are made for."""

from __future__ import annotations

import importlib.metadata

import torch
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from ..harness import ROUNDING, Candidate, Sized

VERSION = f"torchao {importlib.metadata.version('torchao')}"


# bits -> (impl, format, arithmetic, configuration)
WAYS = {
    4: [
        ("torchao", "int4a-g32", "f32",
         PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)),
    ],
    8: [
        ("torchao", "int8-row", "f32", Int8WeightOnlyConfig(set_inductor_config=False)),
        ("torchao_dynamic", "int8-row", "i8",
         Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)),
    ],
}  # fmt: skip


def _prepare(w: torch.Tensor, bits: int, config) -> Sized:
    n, k = w.shape
    layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(w)
    quantize_(layer, config)
    scales = n * k // 32 if bits == 4 else n
    return Sized(layer, n * k * bits // 8 + 4 * scales)  # two bf16 or one f32 for each


def candidates(bits: int) -> list[Candidate]:
    return [
        Candidate(
            impl,
            format,
            arithmetic,
            ROUNDING[bits],
            lambda w, config=config: _prepare(w, bits, config),
            lambda x, stored: stored.value(x),
            torch.bfloat16,
            VERSION,
        )
        for impl, format, arithmetic, config in WAYS[bits]
    ]
