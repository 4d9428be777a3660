"""Attention in f64 by its definition, with torch's own gradients, and what a kernel's results may
be off by (see numerics: a sum of n terms 5 sqrt(n) u, u the unit roundoff of f32)."""

import math
from dataclasses import dataclass

import torch

from memlm.ops.attention import dropout_factors

from .numerics import ROUNDOFF, SMALLEST

U = ROUNDOFF[torch.float32]
EXP = 6 * U  # what exp and the subtraction before it add to a probability, relative
TANH = 8 * U  # what tanh, by way of exp, is off by
KEYS = 128  # of a block: after each the sums are scaled once more
TINY = 1e-37  # exponentials below f32's normal numbers are dropped


@dataclass
class Exact:
    """Results in f64 and their bounds, by name: out, lse, and of gradients q, k, v, mask, sinks."""

    value: dict[str, torch.Tensor]
    bound: dict[str, torch.Tensor]


def scores(
    q, k, mask, *, scale, left=-1, right=-1, to_end=False, softcap=0.0, slopes=None,
    block_mask=None, mask_block=KEYS,
):  # fmt: skip
    """[B, H, L, S]: scores, how far off they may be, and how much of a score's gradient reaches the
    product."""
    dim, (q_len, k_len) = q.shape[-1], (q.shape[-2], k.shape[-2])
    s = scale * (q @ k.mT)
    off = (5 * math.sqrt(dim) + 4) * U * abs(scale) * (q.abs() @ k.abs().mT)
    factor, factor_off = torch.ones_like(s), torch.zeros_like(s)
    if softcap:
        t = torch.tanh(s / softcap)
        factor, factor_off = 1 - t * t, 2 * (off / softcap + TANH) + 4 * U
        s, off = softcap * t, off + softcap * TANH
    i, j = torch.meshgrid(torch.arange(q_len), torch.arange(k_len), indexing="ij")
    unseen = torch.zeros(q_len, k_len, dtype=torch.bool)
    if block_mask is not None:
        unseen = ~block_mask[..., i // mask_block, j // mask_block]
    if to_end:
        i = i + k_len - q_len
    if slopes is not None:
        bias = slopes.double()[:, None, None] * (i - j).abs()
        s, off = s - bias, off + 2 * U * (s.abs() + bias)
    if left >= 0:
        unseen = unseen | (j < i - left)
    if right >= 0:
        unseen = unseen | (j > i + right)
    if mask is not None and mask.dtype == torch.bool:
        unseen = unseen | ~mask
    elif mask is not None:
        s, off = s + mask, off + U * (s.abs() + mask.abs().nan_to_num(posinf=0))
    return s.masked_fill(unseen, -math.inf), off.masked_fill(unseen, 0), factor, factor_off


def exact(
    q, k, v, mask=None, grad=None, *, sinks=None, dropout=0.0, seed=None, first=0, **rules
) -> Exact:
    """Of q [B, H, L, D], k [B, Hk, S, D], v [B, Hk, S, Dv] of one dtype; mask broadcasts, ``grad``
    is that of out; ``first``: the number of the first batch entry."""
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    leaves = {"q": q.double(), "k": k.double(), "v": v.double()}
    if mask is not None:
        leaves["mask"] = mask if mask.dtype == torch.bool else mask.double()
    if sinks is not None:
        leaves["sinks"] = sinks.double()
    differentiable = [name for name, t in leaves.items() if t.is_floating_point()]
    for name in differentiable:
        leaves[name].requires_grad_(grad is not None)
    wide = {name: leaves[name].repeat_interleave(group, dim=1) for name in ("k", "v")}
    s, off, factor, factor_off = scores(leaves["q"], wide["k"], leaves.get("mask"), **rules)
    extra = torch.empty(*s.shape[:3], 0, dtype=torch.float64)
    if sinks is not None:
        extra = leaves["sinks"][:, None, None].expand(*s.shape[:3], 1)
    every = torch.cat((s, extra), dim=-1)
    # Rows that see nothing have no softmax: theirs is taken of zeros, and then dropped.
    empty = (every == -math.inf).all(-1, keepdim=True) if every.shape[-1] else None
    if every.shape[-1]:
        p = every.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., : s.shape[-1]]
        lse = every.detach().logsumexp(-1)
    else:
        p, lse = s, torch.full(s.shape[:3], -math.inf, dtype=torch.float64)
    kept = torch.ones((), dtype=torch.float64)
    if dropout:
        numbers = torch.arange(first, first + q.shape[0])
        kept = dropout_factors(torch.tensor(seed), numbers, *s.shape[1:], dropout)
    out = (p * kept) @ wide["v"]

    with torch.no_grad():
        k_len = s.shape[-1]
        scaled = 1 + k_len // min(KEYS, rules.get("mask_block", KEYS))
        sums = (5 * math.sqrt(k_len + 1) + 2 * scaled) * U
        above = (lse[..., None].nan_to_num(neginf=0) - s).abs().nan_to_num(posinf=0)
        relative = off + 2 * U * above + EXP
        off_lse = (
            (p * relative).sum(-1, keepdim=True)
            + sums
            + 2 * U * lse[..., None].abs().nan_to_num(posinf=0)
        )
        off_p = p * (relative + off_lse) + TINY
        size_v = wide["v"].abs()
        off_out = (off_p * kept) @ size_v + (sums + 4 * U) * (p * kept @ size_v)

        def stored(x, off):
            return off + ROUNDOFF[dtype] * (x.abs() + off) + SMALLEST[dtype]

        bound = {"out": stored(out, off_out), "lse": off_lse[..., 0]}
    value = {"out": out.detach(), "lse": lse}
    if grad is None:
        return Exact(value, bound)

    grads = torch.autograd.grad(out, [leaves[name] for name in differentiable], grad.double())
    value |= dict(zip(differentiable, grads))
    with torch.no_grad():
        g, rows = grad.double(), q.shape[2] * group
        v_dim = v.shape[-1]
        delta = (g * out).sum(-1, keepdim=True)
        off_delta = (g.abs() * bound["out"]).sum(-1, keepdim=True)
        off_delta += 5 * math.sqrt(v_dim) * U * (g * out).abs().sum(-1, keepdim=True)
        dp = (g @ wide["v"].mT) * kept
        off_dp = (5 * math.sqrt(v_dim) + 4) * U * (g.abs() @ size_v.mT) * kept
        ds = p * (dp - delta)
        off_ds = off_p * (dp - delta).abs() + (p + off_p) * (off_dp + off_delta) + 4 * U * ds.abs()
        inner = ds * factor
        off_inner = off_ds * factor + (ds.abs() + off_ds) * factor_off + 2 * U * inner.abs()

        def summed(off, size, terms):
            return off + (5 * math.sqrt(terms) + 4) * U * (size + off)

        def shared(x):  # by the heads of a group
            return x.unflatten(1, (-1, group)).sum(2)

        scale, size_k, size_q = abs(rules["scale"]), wide["k"].abs(), leaves["q"].abs()
        off_q = scale * summed(off_inner @ size_k, inner.abs() @ size_k, k_len)
        off_k = scale * summed(shared(off_inner.mT @ size_q), shared(inner.abs().mT @ size_q), rows)
        weights, off_weights = p * kept, (off_p + 2 * U * p) * kept
        off_v = summed(shared(off_weights.mT @ g.abs()), shared(weights.mT @ g.abs()), rows)
        for name, off in (("q", off_q), ("k", off_k), ("v", off_v)):
            bound[name] = stored(value[name], off)
        if "mask" in differentiable:
            shape = leaves["mask"].shape
            terms = ds.numel() / max(1, leaves["mask"].numel())
            off = summed(off_ds.sum_to_size(shape), ds.abs().sum_to_size(shape), terms)
            bound["mask"] = stored(value["mask"], off)
        if sinks is not None:
            share = (leaves["sinks"][:, None] - lse).exp()[..., None]
            off = share * (off_delta + delta.abs() * (off_lse + EXP))
            off, size = off.sum((0, 2, 3)), (share * delta.abs()).sum((0, 2, 3))
            bound["sinks"] = summed(off, size, q.shape[0] * q.shape[2]) + SMALLEST[torch.float32]
    return Exact(value, bound)
