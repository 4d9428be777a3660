"""``adamw_8bit`` in Triton: a program takes BLOCKS blocks of 256 numbers, each with a scale of its own.

The specification is memlm/ops/adamw_8bit.py, and of the codes memlm/dynamic_codes.py, to the last bit:
divisions and roots are rounded to nearest, and products are rounded before they are added, so not fused.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from memlm.dynamic_codes import BLOCK, SIGNED_ZERO, codebook
from memlm.kernels.quantize_rows import ROUNDER, _magnitude
from memlm.ops.adamw_8bit import _check, factors

# Where the parts of a codebook begin, of which all but the levels have up to 16 entries.
BOUNDS, MULTIPLY, ADD, LEAST, MOST, SIZE = (tl.constexpr(256 + 16 * i) for i in range(6))
COUNT = tl.constexpr(8)  # bounds
ZERO = tl.constexpr(SIGNED_ZERO)


@functools.cache
def codebooks_on(device: torch.device) -> torch.Tensor:
    """f32 [2, SIZE], of both moments, copied there once: a captured graph may not copy from the host."""
    found = torch.zeros(2, SIZE.value)
    for row, signed in zip(found, (True, False)):
        book = codebook(signed)
        row[:256] = book.levels
        for start, part in zip(
            (BOUNDS, MULTIPLY, ADD, LEAST, MOST), (book.bounds, book.multiply, book.add, book.least, book.most)
        ):
            row[start.value : start.value + len(part)] = part
    return found.to(device)


@triton.jit
def _encode(x, book, SIGNED: tl.constexpr):
    """Codes of x [BLOCKS, 256], and the largest magnitude of each block as it is stored."""
    absmax = tl.max(_magnitude(x), 1)
    inverse = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), absmax)
    usable = (inverse < float("inf")) & (absmax < float("inf"))
    inverse = tl.where(usable, inverse, 0.0)[:, None]
    x = tl.where(inverse > 0, x * inverse, 0.0)
    size = tl.abs(x)
    below = tl.zeros(x.shape, tl.int32)
    for b in tl.static_range(COUNT):
        below += (tl.load(book + BOUNDS + b) < size).to(tl.int32)
    j = size * tl.load(book + MULTIPLY + below) + tl.load(book + ADD + below)
    j = j + ROUNDER - ROUNDER
    j = tl.minimum(tl.maximum(j, tl.load(book + LEAST + below)), tl.load(book + MOST + below))
    if SIGNED:
        code = tl.where(x < 0, ZERO - tl.minimum(j, ZERO), ZERO + j)
    else:
        code = j - 1
    stored = tl.where(absmax < float("inf"), tl.where(usable, absmax, 0.0), float("nan"))
    return code.to(tl.int32).to(tl.uint8), stored


@triton.jit
def adamw_8bit_kernel(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, books, count, blocks,
    beta1, rest1, beta2, rest2, decay, step_size, unbias, eps,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, exists = at < count, block < blocks
    m = tl.load(books + tl.load(exp_avg + at, inside, ZERO).to(tl.int32))
    v = tl.load(books + SIZE + tl.load(exp_avg_sq + at, inside, 0).to(tl.int32))
    m *= tl.load(exp_avg_absmax + block, exists, 0.0)[:, None]
    v *= tl.load(exp_avg_sq_absmax + block, exists, 0.0)[:, None]
    g = tl.load(grad + at, inside, 0.0).to(tl.float32)
    m = tl.where(inside, m * beta1 + g * rest1, 0.0)
    v = tl.where(inside, v * beta2 + g * rest2 * g, 0.0)
    w = tl.load(param + at, inside, 0.0).to(tl.float32)
    w = w * decay - tl.div_rn(m, tl.sqrt_rn(v) * unbias + eps) * step_size
    tl.store(param + at, w.to(param.dtype.element_ty), inside)
    codes, absmax = _encode(m, books, True)
    tl.store(exp_avg + at, codes, inside)
    tl.store(exp_avg_absmax + block, absmax, exists)
    codes, absmax = _encode(v, books + SIZE, False)
    tl.store(exp_avg_sq + at, codes, inside)
    tl.store(exp_avg_sq_absmax + block, absmax, exists)


BLOCKS = 4  # of a program: 8 numbers for a thread


def adamw_8bit(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
    weight_decay, step,
) -> None:  # fmt: skip
    """``torch.ops.memlm.adamw_8bit``, of f32, f16 and bf16."""
    _check(
        param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, lr, beta1, beta2, eps,
        weight_decay, step,
    )  # fmt: skip
    blocks = len(exp_avg_absmax)
    if blocks:
        adamw_8bit_kernel[(triton.cdiv(blocks, BLOCKS),)](
            param, grad.contiguous(), exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax,
            codebooks_on(param.device), param.numel(), blocks,
            *factors(lr, beta1, beta2, eps, weight_decay, step),
            BLOCKS=BLOCKS, BLOCK=BLOCK, SIZE=SIZE.value, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
