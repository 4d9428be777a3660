"""``linear_cross_entropy`` in Triton: logits stay in registers.

A program takes BLOCK_M tokens and a share of the vocabulary, BLOCK_N words at a time: products of 16-bit
numbers with f32 sums, then a running maximum and sum of exponentials of each token.  A second kernel joins
the shares in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memlm.kernels import UnsupportedError
from memlm.kernels._targets import Target, fits
from memlm.kernels._weight_only import target_of
from memlm.ops.linear_cross_entropy import _check


@triton.jit
def logits(
    hidden, weight, bias, at, word, m, v, k, hidden_stride, weight_stride,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """f32 [BLOCK_M, BLOCK_N], of tokens ``at`` and words ``word``."""
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h_row = hidden + at[:, None].to(tl.int64) * hidden_stride
    w_row = weight + word[:, None].to(tl.int64) * weight_stride
    for start in range(0, k, BLOCK_K):
        in_k = start + tl.arange(0, BLOCK_K)
        h = tl.load(h_row + in_k[None, :], (at < m)[:, None] & (in_k < k)[None, :], 0.0)
        w = tl.load(w_row + in_k[None, :], (word < v)[:, None] & (in_k < k)[None, :], 0.0)
        z = tl.dot(h, tl.trans(w), z)
    if BIAS:
        z += tl.load(bias + word, word < v, 0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def loss_parts_kernel(
    hidden, weight, bias, targets, parts, m, v, k, hidden_stride, weight_stride, tiles, tiles_here,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [4, shares, m]: largest logit, sum of exponentials relative to it, sum of logits, the
    target's logit."""
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    share, shares = tl.program_id(1), tl.num_programs(1)
    target = tl.load(targets + at, at < m, -1)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_z = tl.zeros([BLOCK_M], tl.float32)
    logit = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(share * tiles_here, tl.minimum((share + 1) * tiles_here, tiles)):
        word = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z = logits(hidden, weight, bias, at, word, m, v, k, hidden_stride, weight_stride, BIAS, BLOCK_M,
                   BLOCK_N, BLOCK_K)  # fmt: skip
        logit += tl.sum(tl.where(word[None, :] == target[:, None], z, 0.0), 1)
        sum_z += tl.sum(tl.where((word < v)[None, :], z, 0.0), 1)
        z = tl.where((word < v)[None, :], z, float("-inf"))
        now = tl.maximum(most, tl.max(z, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(most - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        most = now
    to, part = parts + share.to(tl.int64) * m + at, shares.to(tl.int64) * m
    tl.store(to, most, at < m)
    tl.store(to + part, total, at < m)
    tl.store(to + 2 * part, sum_z, at < m)
    tl.store(to + 3 * part, logit, at < m)


@triton.jit
def join_kernel(
    parts, targets, losses, lse, m, v, shares, ignore_index, smoothing, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sum_z = tl.zeros([BLOCK], tl.float32)
    logit = tl.zeros([BLOCK], tl.float32)
    part = tl.cast(shares, tl.int64) * m
    for share in range(0, shares):
        of = parts + tl.cast(share, tl.int64) * m + at
        other = tl.load(of, at < m, 0.0)
        now = tl.maximum(most, other)
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(most - base) + tl.load(of + part, at < m, 0.0) * tl.exp(other - base)
        sum_z += tl.load(of + 2 * part, at < m, 0.0)
        logit += tl.load(of + 3 * part, at < m, 0.0)
        most = now
    found = most + tl.log(total)
    target = tl.load(targets + at, at < m, 0)
    loss = found - (1 - smoothing) * logit
    if smoothing != 0:
        loss -= smoothing * (sum_z / v)
    loss = tl.where((target >= 0) & (target < v), loss, float("nan"))
    tl.store(losses + at, tl.where(target == ignore_index, 0.0, loss), at < m)
    tl.store(lse + at, found, at < m)


# Tiles of tokens and words, large where there is room, as each is read once for each tile of the other.  With
# 64 k at a time the large ones spill on sm_80 to sm_89 and sm_120; 64 x 64 does on sm_75.
SPACE = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2),
]


def config_of(target: Target) -> triton.Config:
    """The first that a target has room for."""

    def room(config) -> bool:
        m, n, k = (config.kwargs[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return fits(target, config.num_stages * (m + n) * k * 2, m * n, config.num_warps * target.warp)

    return next(filter(room, SPACE))


def settings_of(config: triton.Config | None, device: torch.device) -> dict:
    config = config or config_of(target_of(device))
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def rows_dense(x: torch.Tensor) -> torch.Tensor:
    """x, or where the elements of a row lie apart a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def check_arguments(hidden, weight, bias, targets, label_smoothing) -> None:
    """As the op does; and UnsupportedError for f32."""
    _check(hidden, weight, bias, targets, label_smoothing)
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(f"hidden: got {hidden.dtype}, Triton kernels take f16 and bf16")


MOST_SHARES = 64
PROGRAMS = 512  # about two for each multiprocessor of the largest devices


def linear_cross_entropy(
    hidden, weight, bias, targets, ignore_index, label_smoothing, config: triton.Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.ops.memlm.linear_cross_entropy``, of f16 and bf16.  ``config``: this one instead of that of
    the device."""
    check_arguments(hidden, weight, bias, targets, label_smoothing)
    hidden, weight, targets = rows_dense(hidden), rows_dense(weight), targets.contiguous()
    (m, k), v = hidden.shape, len(weight)
    losses = torch.empty(m, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(losses)
    if not m:
        return losses, lse
    settings = settings_of(config, hidden.device)
    blocks, tiles = triton.cdiv(m, settings["BLOCK_M"]), triton.cdiv(v, settings["BLOCK_N"])
    tiles_here = triton.cdiv(tiles, min(tiles, MOST_SHARES, triton.cdiv(PROGRAMS, blocks)))
    shares = triton.cdiv(tiles, tiles_here)
    parts = torch.empty(4, shares, m, dtype=torch.float32, device=hidden.device)
    loss_parts_kernel[blocks, shares](
        hidden, weight, losses if bias is None else bias, targets, parts, m, v, k, hidden.stride(0),
        weight.stride(0), tiles, tiles_here, BIAS=bias is not None, **settings,
    )  # fmt: skip
    join_kernel[(triton.cdiv(m, 128),)](
        parts, targets, losses, lse, m, v, shares, ignore_index, label_smoothing, BLOCK=128, num_warps=4
    )
    return losses, lse
