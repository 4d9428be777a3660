"""``attention_backward`` in Triton, with the probabilities computed again (FlashAttention-2,
arXiv:2307.08691, algorithm 2): with P = exp(S - lse), delta = rowsum(dO * O) and S the scores,

    dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale dS K      dK = scale dS^T Q

Kernels one after another, so that each sum has one order: delta; dQ by programs that have queries of their
own and go through the keys; dK and dV by programs that have keys and go through the queries of all heads
that share them, with S and dP turned, so that P and dS are the first operands of the next products
everywhere.

Arithmetic: P and dS are rounded to q's dtype before they are multiplied; everything else is f32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels._attention import (
    LOG2E, SPACE, Rows, about, dense, dropout_rows, head_rows, in_best, is_dropped, keys_of, load_rows,
    own_rows, padded, place, queries_of, rules_of, scores, shift, shown, span, store_rows, tuned,
)  # fmt: skip
from memlm.ops.attention import _by_token, _check


@triton.jit
def _bases(lse, i, length):
    """What the probabilities of queries i are relative to; where one sees nothing they become 0."""
    value = tl.load(lse + i, i < length, float("-inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def delta_kernel(
    grad, out, delta, grad_strides, out_strides, heads, q_len,
    v_dim: tl.constexpr, V_DIM: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O)"""
    count = tl.cdiv(q_len, OWN)
    first, rest = tl.program_id(0) % count * OWN, tl.program_id(0) // count
    head, batch = rest % heads, rest // heads
    grads = Rows(head_rows(grad, grad_strides, batch, head, 0), grad_strides[2], q_len, v_dim)
    results = Rows(head_rows(out, out_strides, batch, head, 0), out_strides[2], q_len, v_dim)
    x, y = load_rows(grads, first, OWN, V_DIM), load_rows(results, first, OWN, V_DIM)
    i = first + tl.arange(0, OWN)
    sums = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + rest.to(tl.int64) * q_len + i, sums, i < q_len)


@triton.jit
def grad_sinks_kernel(sinks, lse, delta, grad_sinks, batch, q_len, BLOCK: tl.constexpr):
    """A program for each head: each lane's rows in order, then those of lanes."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    sink = tl.load(sinks + head) * LOG2E
    sums = tl.zeros([BLOCK], tl.float32)
    for b in range(batch):
        rows = (tl.cast(b, tl.int64) * heads + head) * q_len
        for first in range(0, q_len, BLOCK):
            i = first + tl.arange(0, BLOCK)
            share = tl.exp2(sink - _bases(lse + rows, i, q_len))
            sums -= share * tl.load(delta + rows + i, i < q_len, 0.0)
    tl.store(grad_sinks + head, tl.sum(sums, 0))


@triton.jit
def _soften(a, at, head, product, dp, i, j, base, delta, hashes, CHECKED: tl.constexpr):
    """Of products, and gradients of probabilities: the probabilities without dropout's factor, the gradients
    of scores, and those of the products without scale."""
    s, factor = scores(a, at, head, product, i, j, CHECKED)
    p = tl.exp2(s - base)
    kept_p = p
    if a.dropped is not None:
        dropped = is_dropped(a, hashes, j)
        dp = tl.where(dropped, 0.0, dp * a.kept)
        kept_p = tl.where(dropped, 0.0, p)
    grad = tl.where(s == float("-inf"), 0.0, p * (dp - delta))  # what is not seen may have any product
    return kept_p, grad, grad * factor


@triton.jit
def _through_keys(
    sums, a, at, q_tile, grad_tile, base, delta, queries, grads, keys, values, grad_mask,
    begin, steps, gap, gap_end,
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
            k_tile, v_tile = load_rows(keys, first, STEP, DIM), load_rows(values, first, STEP, V_DIM)
            own = own_rows(q_tile, queries, at, OWN, DIM, KEEP)
            product = tl.dot(own, tl.trans(k_tile), input_precision="ieee")
            own_grads = own_rows(grad_tile, grads, at, OWN, V_DIM, KEEP)
            dp = tl.dot(own_grads, tl.trans(v_tile), input_precision="ieee")
            _, of_scores, inner = _soften(
                a, at, at.head, product, dp, i, j, base[:, None], delta[:, None], hashes, CHECKED
            )
            if grad_mask is not None:
                rows = grad_mask + (at.batch.to(tl.int64) * a.heads + at.head) * a.q_len * a.k_len
                tl.store(rows + i.to(tl.int64) * a.k_len + j, of_scores, (i < at.q_len) & (j < at.k_len))
            sums = tl.dot(inner.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
    return sums


@triton.jit
def grad_q_kernel(
    grad, q, k, v, lse, delta, grad_q, grad_mask, grad_strides, q_strides, k_strides, v_strides,
    grad_q_strides, a, scale, about,
    dim: tl.constexpr, v_dim: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    MASK_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    at = place(a, a.q_offsets, a.q_len, a.heads, OWN)
    queries = queries_of(q, q_strides, at, at.head, dim)
    grads = queries_of(grad, grad_strides, at, at.head, v_dim)
    keys = keys_of(k, k_strides, at, at.head // a.group, dim)
    values = keys_of(v, v_strides, at, at.head // a.group, v_dim)
    q_tile, grad_tile = load_rows(queries, at.first, OWN, DIM), load_rows(grads, at.first, OWN, V_DIM)
    rows = (at.batch.to(tl.int64) * a.heads + at.head) * a.q_len + at.q_first
    i = at.first + tl.arange(0, OWN)
    base, of_row = _bases(lse + rows, i, at.q_len), tl.load(delta + rows + i, i < at.q_len, 0.0)

    position, count = at.first + shift(a, at), tl.minimum(at.q_len - at.first, OWN)
    length = tl.where(count > 0, at.k_len, 0)
    begin, full, full_end, edges = span(position, position + count - 1, a.left, a.right, length, STEP)
    sums = tl.zeros([OWN, DIM], tl.float32)
    sums = _through_keys(
        sums, a, at, q_tile, grad_tile, base, of_row, queries, grads, keys, values, grad_mask,
        full, (full_end - full) // STEP, 0, 0, False, DIM, V_DIM, MASK_BLOCK, OWN, STEP, KEEP,
    )  # fmt: skip
    sums = _through_keys(
        sums, a, at, q_tile, grad_tile, base, of_row, queries, grads, keys, values, grad_mask,
        begin, edges, full, full_end, True, DIM, V_DIM, MASK_BLOCK, OWN, STEP, KEEP,
    )  # fmt: skip
    store_rows(queries_of(grad_q, grad_q_strides, at, at.head, dim), at.first, sums * scale, OWN, DIM)


@triton.jit
def _through_queries(
    k_sums, v_sums, a, at, head, k_tile, v_tile, keys, values, queries, grads, lse, delta,
    begin, steps, gap, gap_end,
    CHECKED: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    MASK_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """With the queries of so many steps from ``begin`` on, without those between ``gap`` and ``gap_end``."""
    j = (at.first + tl.arange(0, OWN))[:, None]
    for step in range(steps):
        first = begin + step * STEP
        if CHECKED:
            first += tl.where(first >= gap, gap_end - gap, 0)
        if shown(a, at, head, first, at.first, MASK_BLOCK):
            row = first + tl.arange(0, STEP)
            i = row[None, :]
            q_tile, grad_tile = load_rows(queries, first, STEP, DIM), load_rows(grads, first, STEP, V_DIM)
            base, of_row = _bases(lse, row, at.q_len), tl.load(delta + row, row < at.q_len, 0.0)
            hashes = dropout_rows(a, at, head, i)
            own_keys = own_rows(k_tile, keys, at, OWN, DIM, KEEP)
            product = tl.dot(own_keys, tl.trans(q_tile), input_precision="ieee")
            own_values = own_rows(v_tile, values, at, OWN, V_DIM, KEEP)
            dp = tl.dot(own_values, tl.trans(grad_tile), input_precision="ieee")
            p, _, inner = _soften(
                a, at, head, product, dp, i, j, base[None, :], of_row[None, :], hashes, CHECKED
            )
            v_sums = tl.dot(p.to(grad_tile.dtype), grad_tile, v_sums, input_precision="ieee")
            k_sums = tl.dot(inner.to(q_tile.dtype), q_tile, k_sums, input_precision="ieee")
    return k_sums, v_sums


@triton.jit
def grad_kv_kernel(
    grad, q, k, v, lse, delta, grad_k, grad_v, grad_strides, q_strides, k_strides, v_strides,
    grad_k_strides, grad_v_strides, a, scale, about,
    dim: tl.constexpr, v_dim: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    MASK_BLOCK: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    at = place(a, a.k_offsets, a.k_len, a.heads // a.group, OWN)
    keys = keys_of(k, k_strides, at, at.head, dim)
    values = keys_of(v, v_strides, at, at.head, v_dim)
    k_tile, v_tile = load_rows(keys, at.first, OWN, DIM), load_rows(values, at.first, OWN, V_DIM)

    query, count = at.first - shift(a, at), tl.minimum(at.k_len - at.first, OWN)
    length = tl.where(count > 0, at.q_len, 0)
    begin, full, full_end, edges = span(query, query + count - 1, a.right, a.left, length, STEP)
    k_sums = tl.zeros([OWN, DIM], tl.float32)
    v_sums = tl.zeros([OWN, V_DIM], tl.float32)
    for turn in range(a.group):
        head = at.head * a.group + turn
        rows = (at.batch.to(tl.int64) * a.heads + head) * a.q_len + at.q_first
        queries = queries_of(q, q_strides, at, head, dim)
        grads = queries_of(grad, grad_strides, at, head, v_dim)
        k_sums, v_sums = _through_queries(
            k_sums, v_sums, a, at, head, k_tile, v_tile, keys, values, queries, grads, lse + rows,
            delta + rows, full, (full_end - full) // STEP, 0, 0,
            False, DIM, V_DIM, MASK_BLOCK, OWN, STEP, KEEP,
        )  # fmt: skip
        k_sums, v_sums = _through_queries(
            k_sums, v_sums, a, at, head, k_tile, v_tile, keys, values, queries, grads, lse + rows,
            delta + rows, begin, edges, full, full_end,
            True, DIM, V_DIM, MASK_BLOCK, OWN, STEP, KEEP,
        )  # fmt: skip
    store_rows(keys_of(grad_k, grad_k_strides, at, at.head, dim), at.first, k_sums * scale, OWN, DIM)
    store_rows(keys_of(grad_v, grad_v_strides, at, at.head, v_dim), at.first, v_sums * a.kept, OWN, V_DIM)


def q_room(own: int, step: int, stages: int, dim: int, v_dim: int) -> tuple[int, int]:
    """Queries and gradients, and keys and values of all stages; sums, and scores and their gradients.  All of 16
    queries and their gradients are operands of each of four warps, two numbers in a register: half of them are
    counted, as what is counted is multiplied by ``_attention.NEED``, some 3."""
    copies = own * (dim + v_dim) // 2 if own == 16 else 0
    return (own + stages * step) * (dim + v_dim), own * (dim + 2 * step) + copies


def kv_room(own: int, step: int, stages: int, dim: int, v_dim: int) -> tuple[int, int]:
    """The same the other way round, with two sums."""
    return (own + stages * step) * (dim + v_dim), own * (dim + v_dim + 2 * step)


KV_SPACE = [config for config in SPACE if config.kwargs["OWN"] > 16]  # few keys are rare
tuned_grad_q = tuned(grad_q_kernel, q_room)
tuned_grad_kv = tuned(grad_kv_kernel, kv_room, KV_SPACE)
DELTA_ROWS, SINKS_BLOCK = 32, 256


def attention_backward(
    grad_out, q, k, v, out, lse, mask, block_mask, mask_block, q_offsets, k_offsets, scale, left, right,
    to_end, softcap, slopes, sinks, dropout, seed, want_mask, config: triton.Config | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """``torch.ops.memlm.attention_backward``, of f16, bf16 and f32.  ``config``: this one instead of those
    that are found fastest.

    Raises UnsupportedError for heads of more than 256, or of what the device has registers for.
    """
    _check(q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, slopes, sinks, dropout, seed)
    a = rules_of(
        q, k, v, mask, block_mask, q_offsets, k_offsets, scale, left, right, to_end, softcap, slopes, dropout,
        seed,
    )  # fmt: skip
    grad, q, k, v, out = (dense(x) for x in (grad_out, q, k, v, out))
    (batch, heads, q_len, dim), v_dim = q.shape, v.shape[3]
    grad_q, grad_k, grad_v = (_by_token(x, x.shape) for x in (q, k, v))
    delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grad_mask, grad_sinks = None, delta.new_empty(0 if sinks is None else heads)
    if want_mask:  # what is not seen is not visited
        grad_mask = torch.zeros((batch, heads, q_len, a.k_len), dtype=torch.float32, device=q.device)
    if delta.numel():
        delta_kernel[(triton.cdiv(q_len, DELTA_ROWS) * heads * batch,)](
            grad, out, delta, grad.stride(), out.stride(), heads, q_len,
            v_dim=v_dim, V_DIM=padded(v_dim), OWN=DELTA_ROWS,
        )  # fmt: skip
    if sinks is not None:
        grad_sinks_kernel[(heads,)](sinks, lse, delta, grad_sinks, batch, q_len, BLOCK=SINKS_BLOCK)
    constants = {
        "dim": dim, "v_dim": v_dim, "DIM": padded(dim), "V_DIM": padded(v_dim),
        "MASK_BLOCK": 0 if block_mask is None else mask_block,
    }  # fmt: skip
    given = grad, q, k, v, lse, delta
    strides = [x.stride() for x in given[:4]]
    in_best(
        grad_q_kernel, tuned_grad_q, config, a, batch, heads, q_len,
        *given, grad_q, grad_mask, *strides, grad_q.stride(), a, scale, about(a), **constants,
    )  # fmt: skip
    in_best(
        grad_kv_kernel, tuned_grad_kv, config, a, batch, k.shape[1], a.k_len,
        *given, grad_k, grad_v, *strides, grad_k.stride(), grad_v.stride(), a, scale, about(a), **constants,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, delta.new_empty(0) if grad_mask is None else grad_mask, grad_sinks
