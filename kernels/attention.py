"""``attention`` in Triton: softmax(scale q k^T + bias) v in one pass over the keys (FlashAttention-2,
arXiv:2307.08691).

Arithmetic: products of numbers of q's dtype, their sums f32; scores in f32; weights relative to the largest
score so far, rounded to q's dtype, their sum taken of those unrounded; results rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._attention import (
    LN2, LOG2E, about, dense, dropout_rows, in_best, is_dropped, keys_of, load_rows, own_rows, padded, place,
    queries_of, rules_of, scores, shift, shown, span, store_rows, tuned,
)  # fmt: skip
from memlm.ops.attention import _by_token, _check


@triton.jit
def _through(
    sums, most, total, a, at, q_tile, queries, keys, values, begin, steps, gap, gap_end,
    CHECKED: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    MASK_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """With the keys of so many steps from ``begin`` on, without those between ``gap`` and ``gap_end``."""
    i = (at.first + tl.arange(0, OWN))[:, None]
    hashes = dropout_rows(a, at, at.head, i)
    for step in range(steps):
        first = begin + step * STEP
        if CHECKED:
            first += tl.where(first >= gap, gap_end - gap, 0)
        if shown(a, at, at.head, at.first, first, MASK_BLOCK):
            j = (first + tl.arange(0, STEP))[None, :]
            k_tile = load_rows(keys, first, STEP, DIM)
            own = own_rows(q_tile, queries, at, OWN, DIM, KEEP)
            product = tl.dot(own, tl.trans(k_tile), input_precision="ieee")
            s, _ = scores(a, at, at.head, product, i, j, CHECKED)
            now = tl.maximum(most, tl.max(s, 1))
            base = tl.where(now == float("-inf"), 0, now)
            factor = tl.exp2(most - base)
            p = tl.exp2(s - base[:, None])
            most = now
            total = total * factor + tl.sum(p, 1)
            if a.dropped is not None:
                p = tl.where(is_dropped(a, hashes, j), 0.0, p)
            v_tile = load_rows(values, first, STEP, V_DIM)
            sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * factor[:, None], input_precision="ieee")
    return sums, most, total


@triton.jit
def attention_kernel(
    q, k, v, out, lse, sinks, q_strides, k_strides, v_strides, out_strides, a, about,
    dim: tl.constexpr, v_dim: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    MASK_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    at = place(a, a.q_offsets, a.q_len, a.heads, OWN)
    queries = queries_of(q, q_strides, at, at.head, dim)
    keys = keys_of(k, k_strides, at, at.head // a.group, dim)
    values = keys_of(v, v_strides, at, at.head // a.group, v_dim)
    q_tile = load_rows(queries, at.first, OWN, DIM)

    position, count = at.first + shift(a, at), tl.minimum(at.q_len - at.first, OWN)
    length = tl.where(count > 0, at.k_len, 0)
    begin, full, full_end, edges = span(position, position + count - 1, a.left, a.right, length, STEP)
    sums = tl.zeros([OWN, V_DIM], tl.float32)
    most = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    sums, most, total = _through(
        sums, most, total, a, at, q_tile, queries, keys, values, full, (full_end - full) // STEP, 0, 0,
        False, DIM, V_DIM, MASK_BLOCK, OWN, STEP, KEEP,
    )  # fmt: skip
    sums, most, total = _through(
        sums, most, total, a, at, q_tile, queries, keys, values, begin, edges, full, full_end,
        True, DIM, V_DIM, MASK_BLOCK, OWN, STEP, KEEP,
    )  # fmt: skip

    factor = tl.full([OWN], 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + at.head) * LOG2E
        now = tl.maximum(most, sink)
        base = tl.where(now == float("-inf"), 0, now)
        factor = tl.exp2(most - base)
        total = total * factor + tl.exp2(sink - base)
        most = now
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    factor = tl.where(empty, 0.0, factor / total * a.kept)
    i = at.first + tl.arange(0, OWN)
    of_head = lse + (at.batch.to(tl.int64) * a.heads + at.head) * a.q_len + at.q_first
    tl.store(of_head + i, tl.where(empty, float("-inf"), (most + tl.log2(total)) * LN2), i < at.q_len)
    results = queries_of(out, out_strides, at, at.head, v_dim)
    store_rows(results, at.first, sums * factor[:, None], OWN, V_DIM)


def room(own: int, step: int, stages: int, dim: int, v_dim: int) -> tuple[int, int]:
    """Queries, and keys and values of all stages; sums and scores."""
    return own * dim + stages * step * (dim + v_dim), own * (v_dim + step)


tuned_kernel = tuned(attention_kernel, room)


def attention(
    q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, scale, left, right, to_end, softcap, slopes,
    sinks, dropout, seed, config: triton.Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``torch.ops.memlm.attention``, of f16, bf16 and f32.  ``config``: this one instead of the one that is
    found fastest.  Offsets are not checked; what lies beyond the tensors is not read.

    Raises UnsupportedError for heads of more than 256, or of what the device has registers for.
    """
    _check(q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, slopes, sinks, dropout, seed)
    a = rules_of(
        q, k, v, mask, block_mask, q_offsets, k_offsets, scale, left, right, to_end, softcap, slopes, dropout,
        seed,
    )  # fmt: skip
    q, k, v = dense(q), dense(k), dense(v)
    dim, v_dim = q.shape[3], v.shape[3]
    out = _by_token(q, (*q.shape[:3], v_dim))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    in_best(
        attention_kernel, tuned_kernel, config, a, q.shape[0], a.heads, a.q_len,
        q, k, v, out, lse, sinks, *(x.stride() for x in (q, k, v, out)), a, about(a),
        dim=dim, v_dim=v_dim, DIM=padded(dim), V_DIM=padded(v_dim),
        MASK_BLOCK=0 if block_mask is None else mask_block,
    )  # fmt: skip
    return out, lse
