"""torchao: 4-bit weights (asymmetric, groups of 32), 8-bit weights, and 8-bit weights with a scale
for each row of x; in bf16, which its CPU paths are made for, and compiled where that helps."""

from __future__ import annotations

import functools
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


# bits -> (impl, format, arithmetic, configuration, whether it is compiled)
WAYS = {
    4: [
        ("torchao", "int4a-g32", "f32",
         PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False), False),
    ],
    8: [
        ("torchao", "int8-row", "f32",
         Int8WeightOnlyConfig(set_inductor_config=False), False),
        ("torchao_compiled", "int8-row", "f32",
         Int8WeightOnlyConfig(set_inductor_config=False), True),
        ("torchao_dynamic", "int8-row", "i8",
         Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), True),
    ],
}  # fmt: skip


def _prepare(w: torch.Tensor, bits: int, config, compiled: bool) -> Sized:
    n, k = w.shape
    layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.copy_(w)
    quantize_(layer, config)

    def call(layer, x):
        return layer(x)

    if compiled:
        # Code of its own: torch keeps what it compiles with the code, and only for a few shapes.
        call.__code__ = call.__code__.replace()
        call = torch.compile(call)
    scales = n * k // 32 if bits == 4 else n
    return Sized((call, layer), n * k * bits // 8 + 4 * scales)  # two bf16 or one f32 for each


def _run(x: torch.Tensor, stored: Sized) -> torch.Tensor:
    call, layer = stored.value
    return call(layer, x)


def candidates(bits: int) -> list[Candidate]:
    return [
        Candidate(
            impl,
            format,
            arithmetic,
            ROUNDING[bits],
            functools.partial(_prepare, bits=bits, config=config, compiled=compiled),
            _run,
            torch.bfloat16,
            VERSION,
        )
        for impl, format, arithmetic, config, compiled in WAYS[bits]
    ]
