"""Calls of the CUDA kernels that between them launch each kernel there is: for the table of compiled code."""

from __future__ import annotations

import torch

from memlm import formats
from memlm.formats import Format, Packed

from . import emulator

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
WEIGHT_ONLY = {
    "w2_matmul": ["int2-g64"],
    "w4_matmul": ["int4-g64", "nf4-g64"],
    "w8_matmul": ["int8-row"],
}
ROWS = (1, 16, 32, 64)  # one for each size of tile


def packed(format: str, n: int, k: int) -> Packed:
    """Of zeros."""
    parsed = Format.parse(format)
    parts = formats.layout(parsed, n, k)
    return Packed(parsed, n, k, **{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in parts.items()})


def all_calls(arch: int):
    """Functions that each call one."""
    for dtype in DTYPES.values():
        if arch < 80 and dtype == torch.bfloat16:
            continue
        for op, names in WEIGHT_ONLY.items():
            for name in names:
                w = packed(name, 4096, 4096)
                norm = torch.zeros(4096, dtype=dtype)
                for m in ROWS:
                    x = torch.zeros(m, 4096, dtype=dtype)
                    yield lambda op=op, x=x, w=w, norm=norm: emulator.matmul(op, x, w, None, norm=norm, eps=1e-5)
