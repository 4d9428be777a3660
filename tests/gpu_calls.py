"""Calls of the CUDA kernels that between them launch each kernel there is: for the table of compiled code.
The emulator notes what they would launch, and runs nothing."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch

from memlm import formats
from memlm.formats import Format, Packed
from memlm.kv_formats import TYPES
from memlm.sparse_formats import SparseFormat

from . import adamw_cases, cross_entropy_cases, cuda_attention, cuda_kv, emulator, gpu_limits
from . import test_cuda_linear_cross_entropy as linear_cross_entropy
from .matmul_checks import random_case
from .paged import paged
from .test_cuda_adamw_8bit import adamw_8bit
from .test_cuda_block_sparse_matmul import dequantized, run_gradient
from .test_cuda_dequantize import dequantize
from .test_cuda_matmul_topk import topk
from .test_cuda_quantize_rows import quantize_rows
from .test_cuda_quantize_weight import quantize
from .test_cuda_w4_sparse_dequantize import dequantize as sparse_rows

Calls = Iterator[Callable]

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
HEADS = (64, 128, 256)  # the largest head of each size of tile


def never(kernel: str, arch: int) -> bool:
    """Whether no launcher starts a kernel on an architecture.  On compute capability 7.5: those of bf16, of blocks
    of floats, and gradients of heads above 128, which need more shared memory than it has.  Nor, with less than
    100 KB of it, 32 queries of heads of 256 over a paged cache, of int4 on 7.5, and attention over 64 keys at a
    time with heads of 128."""
    little = gpu_limits.ARCHS[arch].block_shared < 100 * gpu_limits.KB
    if little and re.fullmatch(r"attention_kernel<.*, 128, 64, true>", kernel):
        return True
    if arch < 80:
        return bool(re.search(r"bf16|Bf16s|F32s|grad_\w+kernel<f16, 256|paged_attention_kernel<f16, 3, 4, 4>", kernel))
    return little and bool(re.fullmatch(r"paged_attention_kernel<.*, 4, 4>", kernel))


def types(arch: int) -> list[torch.dtype]:
    """Of 16 bits."""
    return [torch.float16] if arch < 80 else [torch.float16, torch.bfloat16]


def packed(format: str, n: int, k: int) -> Packed:
    """Of zeros."""
    parsed = Format.parse(format)
    parts = formats.layout(parsed, n, k)
    return Packed(parsed, n, k, **{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in parts.items()})


def weight_only(arch: int) -> Calls:
    for dtype in types(arch):
        norm = torch.zeros(4096, dtype=dtype)
        for op, names in WEIGHT_ONLY.items():
            for name in names:
                w = packed(name, 4096, 4096)
                for m in ROWS:
                    x = torch.zeros(m, 4096, dtype=dtype)
                    yield partial(emulator.matmul, op, x, w, None, norm=norm, eps=1e-5)


def sparse(arch: int) -> Calls:
    for op, names in SPARSE.items():
        for name in names:
            if arch < 80 and SparseFormat.parse(name).is_float:
                continue
            w = random_case(name, 64, 128, 1, torch.float32)[1]
            for dtype in types(arch):
                for m in ROWS:
                    yield partial(emulator.matmul, op, torch.zeros(m, 128, dtype=dtype), w, None)


def sparse_gradients(arch: int) -> Calls:
    grad, rows = torch.zeros(4, 64), ctypes.c_int64(4)
    for name in SPARSE["block_sparse_matmul"]:
        w = random_case(name, 64, 128, 1, torch.float32)[1]
        given = ("grad_x", w, w.format.bits, rows, grad)
        yield partial(run_gradient, *given, out=torch.empty(4, 128), arch=800)
    w = random_case("block/f32", 64, 128, 1, torch.float32)[1]
    given = ("grad_values", w, rows, grad, torch.zeros(4, 128))
    yield partial(run_gradient, *given, out=torch.empty_like(w.codes), arch=800)


def others(arch: int) -> Calls:
    """w4_sparse_dequantize, that of blocks, quantize_weight and matmul_topk."""
    for name in ("2:4/int4-g32", "unstructured/int4-g32", "block/int4-g32"):
        w = random_case(name, 64, 128, 1, torch.float32)[1]
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield partial(dequantized if name.startswith("block") else sparse_rows, w, 0, 64, dtype)
    for name in ("int8-row", "int4-g128", "int4a-g128", "nf4-g128"):
        yield partial(quantize, torch.zeros(64, 128), name)
    yield partial(topk, torch.zeros(4, 4096, dtype=torch.float16), packed("int4-g64", 4096, 4096), top=50)


def int8(arch: int) -> Calls:
    def w8a8(x, w: Packed, group: int, scales=None, dtype=None) -> None:
        """w8a8_matmul of numbers, or of codes and scales."""
        after = (ctypes.c_void_p(emulator.pointer(scales)), ctypes.c_int64(group))
        emulator.matmul("w8a8_matmul", x, w, None, after=after, read=[scales], dtype=dtype or x.dtype)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for group, name in ((0, "int8-row"), (32, "int8-g32")):
            yield partial(quantize_rows, torch.zeros(4, 100, dtype=dtype), group)
            for m in ROWS:
                x = torch.zeros(m, 4096, dtype=dtype)
                yield partial(w8a8, x, packed(name, 4096, 4096), group)
                codes, scales = torch.zeros(m, 4096, dtype=torch.int8), torch.ones(m, 128 if group else 1)
                for q in (codes, codes[:, :4095]):  # the second is made ready
                    yield partial(w8a8, q, packed(name, 4096, q.shape[1]), group, scales, dtype)


def rows(arch: int) -> Calls:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name in ("int2-g64", "int4-g64", "int8-g64"):
            yield partial(dequantize, packed(name, 64, 64), 0, 64, dtype)


def attention(arch: int) -> Calls:
    for dtype in types(arch):
        for dim in HEADS:
            x = torch.zeros(1, 1, 64, dim, dtype=dtype)
            yield partial(cuda_attention.forward, x, x, x)
            yield partial(cuda_attention.forward, x, x, x, softcap=1.0)
            blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
            yield partial(cuda_attention.forward, x, x, x, block_mask=blocks, mask_block=32)
            if arch >= 80 or dim <= 128:
                yield partial(cuda_attention.backward, x, x, x, x, sinks=torch.zeros(1))


def paged_cache(arch: int) -> Calls:
    for dtype in types(arch):
        for type in TYPES:
            for dim in (64, 136 if arch < 80 else 256):  # two sizes of head; 7.5 has no room for 256
                made = paged(type, dim, [1024], 1, dtype=dtype)
                for heads in (1, 32):  # of a key-value head: two sizes of tile; and long enough to be split
                    q = torch.zeros(1, heads, dim, dtype=dtype)
                    step = made.step([1])
                    given = (q, made.pool, made.tails, *step, 1.0, 0, 0.0, None, None)
                    yield partial(cuda_kv.paged_attention, *given)
                k = torch.zeros(1, 1, dim, dtype=dtype)
                yield partial(cuda_kv.kv_append, made.pool, made.tails, k, k, *step)


def training(arch: int) -> Calls:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield partial(adamw_8bit, adamw_cases.random_case(adamw_cases.Case(300), dtype))
    for dtype in types(arch):
        given = cross_entropy_cases.random_case(cross_entropy_cases.Case(4, 8, 9), dtype)
        yield partial(linear_cross_entropy.forward, given)
        yield partial(linear_cross_entropy.backward, given, torch.ones(4), torch.ones(4), 0, 9)


ALL = (weight_only, sparse, sparse_gradients, int8, rows, attention, paged_cache, others, training)


def all_calls(arch: int) -> Calls:
    """Functions that each call one."""
    for calls in ALL:
        yield from calls(arch)
