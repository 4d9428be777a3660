"""Calls of the CUDA kernels that between them launch each kernel there is: for the table of compiled code."""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from memlm import formats
from memlm.formats import Format, Packed
from memlm.sparse_formats import SparseFormat

from . import adamw_cases, cross_entropy_cases, emulator
from .matmul_checks import random_case
from .test_cuda_adamw_8bit import adamw_8bit
from .test_cuda_block_sparse_matmul import run_gradient
from .test_cuda_linear_cross_entropy import forward as linear_cross_entropy
from .test_cuda_quantize_rows import quantize_rows

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
WEIGHT_ONLY = {
    "w2_matmul": ["int2-g64"],
    "w4_matmul": ["int4-g64", "nf4-g64"],
    "w8_matmul": ["int8-row"],
}
SPARSE = {
    "w4_sparse_matmul": ["2:4/int4-g32", "2:4/nf4-g64", "unstructured/int4-g32", "unstructured/nf4-g64"],
    "block_sparse_matmul": [
        f"block/{values}" for values in "int2-g32 int4-g32 nf4-g32 int8-g32 bf16 f32".split()
    ],
}
ROWS = (1, 16, 32, 64)  # one for each size of tile


def packed(format: str, n: int, k: int) -> Packed:
    """Of zeros."""
    parsed = Format.parse(format)
    parts = formats.layout(parsed, n, k)
    return Packed(parsed, n, k, **{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in parts.items()})


def all_calls(arch: int):
    """Functions that each call one."""
    types = [d for d in DTYPES.values() if arch >= 80 or d != torch.bfloat16]
    for dtype in types:
        norm = torch.zeros(4096, dtype=dtype)
        for op, names in WEIGHT_ONLY.items():
            for name in names:
                w = packed(name, 4096, 4096)
                for m in ROWS:
                    x = torch.zeros(m, 4096, dtype=dtype)
                    yield partial(emulator.matmul, op, x, w, None, norm=norm, eps=1e-5)
        for op, names in SPARSE.items():
            for name in names:
                if arch < 80 and SparseFormat.parse(name).is_float:
                    continue
                w = random_case(name, 64, 128, 1, torch.float32)[1]
                for m in ROWS:
                    yield partial(emulator.matmul, op, torch.zeros(m, 128, dtype=dtype), w, None)
    w8 = packed("int8-row", 4096, 4096)
    for dtype in (torch.float32, *DTYPES.values()):
        for group in (0, 32):
            yield partial(quantize_rows, torch.zeros(4, 100, dtype=dtype), group)
            weights = w8 if group == 0 else packed("int8-g32", 4096, 4096)
            for m in ROWS:
                x = torch.zeros(m, 4096, dtype=dtype)
                yield partial(w8a8, x, weights, group)
                codes, scales = torch.zeros(m, 4096, dtype=torch.int8), torch.ones(m, 128 if group else 1)
                for q in (codes, codes[:, :4095]):  # the second is made ready
                    w = weights if q.shape[1] == 4096 else packed(weights.format.name, 4096, 4095)
                    yield partial(w8a8, q, w, group, scales, dtype)
    for name in SPARSE["block_sparse_matmul"]:
        w = random_case(name, 64, 128, 1, torch.float32)[1]
        grad, rows = torch.zeros(4, 64), ctypes.c_int64(4)
        given = ("grad_x", w, w.format.bits, rows, grad)
        yield partial(run_gradient, *given, out=torch.empty(4, 128), arch=800)
    w = random_case("block/f32", 64, 128, 1, torch.float32)[1]
    given = ("grad_values", w, rows, grad, torch.zeros(4, 128))
    yield partial(run_gradient, *given, out=torch.empty_like(w.codes), arch=800)
    yield from training_calls(arch)


def w8a8(x, w: Packed, group: int, scales=None, dtype=None) -> None:
    """w8a8_matmul of numbers, or of codes and scales."""
    after = (ctypes.c_void_p(emulator.pointer(scales)), ctypes.c_int64(group))
    emulator.matmul("w8a8_matmul", x, w, None, after=after, read=[scales], dtype=dtype or x.dtype)


def training_calls(arch: int):
    """Of the kernels for training."""
    for dtype in (torch.float32, *DTYPES.values()):
        yield partial(adamw_8bit, adamw_cases.random_case(adamw_cases.Case(300), dtype))
    for dtype in DTYPES.values():
        if arch >= 80 or dtype != torch.bfloat16:
            given = cross_entropy_cases.random_case(cross_entropy_cases.Case(4, 8, 9), dtype)
            yield partial(linear_cross_entropy, given)
