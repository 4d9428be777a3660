"""``block_sparse_grad_values`` in Triton: grad^T x where blocks of W are stored, in f32 throughout.

A program computes a block, 32 k by 16 rows of W, from the 16 columns of grad and 32 of x that meet there, CHUNK
of their rows at a time.  Blocks of a tile follow each other, so that what they load of grad comes from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._sparse import tiles_of
from memlm.ops.block_sparse_matmul import _grad_values_fake

CHUNK = 32


@triton.jit
def grad_values_kernel(grad, x, tiles, places, out, m, n, k, CHUNK: tl.constexpr):
    block = tl.program_id(0)
    row, in_block = tl.arange(0, 16), tl.arange(0, 32)
    in_n = tl.load(tiles + block).to(tl.int32) * 16 + row
    in_k = tl.load(places + block) * 32 + in_block
    sums = tl.zeros([32, 16], tl.float32)
    for begin in range(0, m, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        wide = at.to(tl.int64)
        xs = tl.load(x + wide[None, :] * k + in_k[:, None], (at < m)[None, :] & (in_k < k)[:, None], 0.0)
        gs = tl.load(grad + wide[:, None] * n + in_n[None, :], (at < m)[:, None] & (in_n < n)[None, :], 0.0)
        sums = tl.dot(xs, gs, sums, input_precision="ieee")
    tl.store(out + block.to(tl.int64) * 512 + in_block[:, None] * 16 + row[None, :], sums)


def block_sparse_grad_values(grad, x, starts, places, n, k) -> torch.Tensor:
    """``torch.ops.memlm.block_sparse_grad_values``.  What starts and places say is believed."""
    out = _grad_values_fake(grad, x, starts, places, n, k)
    if len(places):
        tiles = tiles_of(starts, torch.arange(len(places), device=places.device))
        grad_values_kernel[(len(places),)](
            grad.contiguous(), x.contiguous(), tiles, places, out, len(grad), n, k, CHUNK=CHUNK, num_warps=2
        )
    return out
