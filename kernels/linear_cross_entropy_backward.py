"""``linear_cross_entropy_backward`` in Triton, and torch's products.

The vocabulary goes in chunks.  Of each a kernel computes the logits again and makes of them their
gradients, rounded to the weights' dtype; two products, torch's own, make of these the gradients of hidden
and of the chunk's weights.  With several chunks, hidden's gradient is summed in f32 of products that are
rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels.linear_cross_entropy import check_arguments, logits, rows_dense, settings_of

CHUNK = 1 << 26  # logits whose gradients are there at once: 128 MB
UNIT = 128  # words that a chunk is a multiple of


@triton.jit
def logit_gradient_kernel(
    hidden, weight, bias, targets, lse, grad, out, m, v, k, hidden_stride, weight_stride, first, words,
    ignore_index, smoothing,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [m, words]: what the losses' gradients make of logits ``first`` and following."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = first + place
    z = logits(hidden, weight, bias, at, word, m, v, k, hidden_stride, weight_stride, BIAS, BLOCK_M,
               BLOCK_N, BLOCK_K)  # fmt: skip
    target = tl.load(targets + at, at < m, 0)
    of = tl.load(grad + at, at < m, 0.0)
    of = tl.where(target == ignore_index, 0.0, of)
    p = tl.exp(z - tl.load(lse + at, at < m, 0.0)[:, None])
    p -= tl.where(word[None, :] == target[:, None], 1 - smoothing, 0.0) + smoothing / v
    p *= of[:, None]
    to = out + at[:, None].to(tl.int64) * words + place[None, :]
    tl.store(to, p.to(out.dtype.element_ty), (at < m)[:, None] & (place < words)[None, :])


def linear_cross_entropy_backward(
    grad, hidden, weight, bias, targets, lse, ignore_index, label_smoothing, want_hidden, want_weight,
    want_bias, config: triton.Config | None = None, chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``torch.ops.memlm.linear_cross_entropy_backward``, of f16 and bf16.  ``chunk``: logits at once, at
    least UNIT for each token."""
    check_arguments(hidden, weight, bias, targets, label_smoothing)
    hidden, weight = rows_dense(hidden), rows_dense(weight)
    (m, k), v, nothing = hidden.shape, len(weight), hidden.new_empty(0)
    d_hidden, d_weight = nothing, torch.zeros_like(weight) if want_weight else nothing
    d_bias = torch.zeros_like(bias) if want_bias else nothing
    size = max(chunk // max(m, 1) // UNIT * UNIT, UNIT)
    if want_hidden:
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32 if size < v else hidden.dtype)
    if not m:
        return d_hidden.to(hidden.dtype), d_weight, d_bias
    settings = settings_of(config, hidden.device)
    buffer = hidden.new_empty(m * min(size, v))
    for first in range(0, v, size):
        words = min(size, v - first)
        dz = buffer[: m * words].view(m, words)
        grid = triton.cdiv(m, settings["BLOCK_M"]), triton.cdiv(words, settings["BLOCK_N"])
        logit_gradient_kernel[grid](
            hidden, weight, lse if bias is None else bias, targets.contiguous(), lse.contiguous(),
            grad.contiguous(), dz, m, v, k, hidden.stride(0), weight.stride(0), first, words, ignore_index,
            label_smoothing, BIAS=bias is not None, **settings,
        )  # fmt: skip
        columns = slice(first, first + words)
        if want_hidden:
            d_hidden += dz @ weight[columns]
        if want_weight:
            torch.mm(dz.T, hidden, out=d_weight[columns])
        if want_bias:
            d_bias[columns] = dz.sum(0, dtype=torch.float32)
    return d_hidden.to(hidden.dtype), d_weight, d_bias
