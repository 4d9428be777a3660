"""``matmul_topk`` in Triton: the product a panel of features at a time, and the largest of what it gives.

Two kernels follow a panel's product: one whose programs each sort CHUNK logits of a row and keep the ``top``
largest, and one that merges those, and what earlier panels had.  A logit and its index are one integer of 64
bits, whose order is that of the result: the bits of the value so that they ascend with it, NaN above all, -0
as 0; below them the index, inverted, as the lowest comes first.

  key    63 ... 32: the value    31 ... 0: 0xffffffff - index        the least of all: nothing
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.formats import TILE_ROWS, Packed
from memlm.kernels import UnsupportedError
from memlm.kernels._weight_only import weight_only
from memlm.kernels.quantize_rows import quantize_rows
from memlm.kernels.w8a8_matmul import w8a8_matmul
from memlm.ops import _matmul
from memlm.ops.matmul_topk import MODES, check

CHUNK = 2048  # logits that a program sorts
MOST_TOP = CHUNK
LOGITS = 1 << 22  # of a panel: 16 MB, more blocks of 64 x 128 than any GPU runs at once
LEAST_FEATURES = 256
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _key(value, index):
    value = tl.where(value == 0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value != value, 0x7FFFFFFF, order)
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def chunk_kernel(logits, keys, features, first, slots, CHUNK: tl.constexpr, TOP: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * features + at, at < features, 0.0)
    key = tl.where(at < features, _key(value, first + at), NOTHING)
    best = tl.topk(key, TOP)
    tl.store(keys + (row * slots + 1 + chunk) * TOP + tl.arange(0, TOP), best)


@triton.jit
def row_kernel(keys, values, indices, slots, begin, end, top, LAST: tl.constexpr, TOP: tl.constexpr):
    """Slots begin .. end - 1, each sorted, become the first; or with LAST the result."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TOP)
    of_row = keys + row * slots * TOP
    best = tl.full([TOP], NOTHING, tl.int64)
    for slot in range(begin, end):
        rising = tl.load(of_row + slot * TOP + (TOP - 1 - i))
        # Of two sorted sequences, one the other way round: the larger half, which rises and then falls.
        best = tl.bitonic_merge(tl.maximum(best, rising), descending=True)
    if LAST:
        order = (best >> 32).to(tl.int32)
        value = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)  # all bits: a NaN
        tl.store(values + row * top + i, value, i < top)
        tl.store(indices + row * top + i, 0xFFFFFFFF - (best & 0xFFFFFFFF), i < top)
    else:
        tl.store(of_row + i, best)


def _some(packed: Packed, first: int, n: int) -> Packed:
    """Features first .. first + n - 1, of whole tiles unless they are the last: views."""
    tiles = slice(first // TILE_ROWS, -(-(first + n) // TILE_ROWS))
    parts = {name: tensor[tiles] for name, tensor in packed.tensors().items()}
    return Packed(packed.format, n, packed.k, **parts)


def matmul_topk(
    x, codes, scales, offsets, bits, codebook, n, k, group, bias, mode, norm, eps, top,
    config=None, most_logits: int = LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``torch.ops.memlm.matmul_topk``; modes 0 and 1 are the same here.  ``config``: of the product, instead
    of the one that is found fastest; ``most_logits``: of a panel, if they are more than 256 features.

    Raises UnsupportedError for more than 2,048 logits, or x of f32 without mode 2.
    """
    packed = _matmul.packed_with(codes, scales, offsets, bits, codebook, n, k, group)
    check(x, packed, bias, norm, top)
    whole = MODES[mode] == "w8a8"
    if whole and bits != 8:
        raise ValueError(f"mode: got {mode} for {bits} bits")
    if top > MOST_TOP:
        raise UnsupportedError(f"top: got {top}, the Triton kernel finds up to {MOST_TOP}")
    rows = x.reshape(-1, k)
    m = len(rows)
    values = torch.empty(m, top, dtype=torch.float32, device=x.device)
    indices = torch.empty(m, top, dtype=torch.int64, device=x.device)
    shape = (*x.shape[:-1], top)
    if not m:
        return values.view(shape), indices.view(shape)
    if whole:
        rows, x_scales = quantize_rows(rows, 0, norm, eps)
    width = max(LEAST_FEATURES, most_logits // m // LEAST_FEATURES * LEAST_FEATURES)
    width = min(width, n)
    padded_top = max(16, triton.next_power_of_2(top))
    slots = 1 + triton.cdiv(width, CHUNK)
    keys = torch.empty(m, slots, padded_top, dtype=torch.int64, device=x.device)
    for first in range(0, n, width):
        some = _some(packed, first, min(width, n - first))
        part = None if bias is None else bias[first : first + some.n]
        if whole:
            part = None if part is None else part.float()
            given = (some.codes, some.scales, some.n, k, group, part, 0, None, 0.0, False, None, torch.float32)
            logits = w8a8_matmul(rows, x_scales, *given, config=config)
        else:
            logits = weight_only(rows, some, part, norm, eps, False, None, config, torch.float32)
        chunks = triton.cdiv(some.n, CHUNK)
        chunk_kernel[m, chunks](logits, keys, some.n, first, slots, CHUNK=CHUNK, TOP=padded_top, num_warps=8)
        row_kernel[(m,)](
            keys, values, indices, slots, 0 if first else 1, 1 + chunks, top,
            LAST=first + width >= n, TOP=padded_top, num_warps=4,
        )  # fmt: skip
    return values.view(shape), indices.view(shape)
