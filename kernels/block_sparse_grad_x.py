"""``block_sparse_grad_x`` in Triton: grad W over the stored blocks, in f32 throughout.

Blocks are stored by rows of W and are needed by columns: sorted by their places, those of 32 k lie one behind
the other, in the order of their tiles.  A program computes BLOCK_M rows by 32 k from its column's blocks, each
with the 16 columns of grad that meet it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._sparse import _block, block_arguments, tiles_of
from memlm.ops.block_sparse_matmul import _grad_x_fake, _weights
from memlm.sparse_formats import SparseTensors

BLOCK_M = 64


@triton.jit
def grad_x_kernel(
    grad, order, tiles, begins, codes, scales, offsets, levels, out, m, n, k, columns,
    BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % columns
    at = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    row, in_block = tl.arange(0, 16), tl.arange(0, 32)
    begin = tl.load(begins + column)
    count = (tl.load(begins + column + 1) - begin).to(tl.int32)
    order += begin
    tiles += begin
    grad_row = grad + at[:, None].to(tl.int64) * n
    sums = tl.zeros([BLOCK_M, 32], tl.float32)
    for i in range(count):
        block = tl.load(order + i)
        in_n = tl.load(tiles + i).to(tl.int32) * 16 + row
        g = tl.load(grad_row + in_n[None, :], (at < m)[:, None] & (in_n < n)[None, :], 0.0)
        w = _block(codes, levels, block, tl.float32, BITS, ZERO, LEVELS).to(tl.float32)
        if BITS < 16:
            w *= tl.load(scales + block * 16 + row).to(tl.float32)[None, :]
        if OFFSETS:
            w += tl.load(offsets + block * 16 + row).to(tl.float32)[None, :]
        w = tl.where((in_n < n)[None, :], w, 0.0)  # floats beyond n may be anything
        sums = tl.dot(g, tl.trans(w), sums, input_precision="ieee")
    in_k = column * 32 + in_block
    place = at[:, None].to(tl.int64) * k + in_k[None, :]
    tl.store(out + place, sums, (at < m)[:, None] & (in_k < k)[None, :])


def block_sparse_grad_x(grad, starts, places, codes, scales, offsets, bits, codebook, n, k) -> torch.Tensor:
    """``torch.ops.memlm.block_sparse_grad_x``.  What starts and places say is believed."""
    weights = (starts, places, codes, scales, offsets, bits, codebook, n, k)
    out = _grad_x_fake(grad, *weights)
    if not len(grad):
        return out
    packed = _weights(SparseTensors, *weights)
    columns = packed.format.padded_k(k) // 32
    ascending, order = torch.sort(places, stable=True)
    begins = torch.searchsorted(ascending, torch.arange(columns + 1, dtype=places.dtype, device=places.device))
    tensors, constants = block_arguments(packed)
    grid = triton.cdiv(len(grad), BLOCK_M) * columns
    grad_x_kernel[(grid,)](
        grad.contiguous(), order, tiles_of(starts, order), begins, *(out if t is None else t for t in tensors),
        out, len(grad), n, k, columns, **constants, BLOCK_M=BLOCK_M, num_warps=4,
    )  # fmt: skip
    return out
