"""memlm_cuda_attention on tensors, in the form in which tests/test_attention.py runs implementations."""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int, c_int64, c_uint64, c_void_p

import torch

from .emulator import DTYPES, emulator, pointer

Three, Four = c_int64 * 3, c_int64 * 4


class AttentionArgs(Structure):
    """memlm_attention_args"""

    _fields_ = [
        *((name, c_int64) for name in "batch heads kv_heads q_len k_len head_dim v_dim".split()),
        *((name, c_void_p) for name in "q k v out".split()),
        *((f"{name}_strides", Three) for name in "q k v out".split()),
        ("dtype", c_int), ("lse", c_void_p), ("q_offsets", c_void_p), ("k_offsets", c_void_p),
        ("scale", c_float), ("left", c_int64), ("right", c_int64), ("to_end", c_int), ("mask", c_void_p),
        ("mask_strides", Four), ("mask_is_bool", c_int), ("block_mask", c_void_p),
        ("block_mask_strides", Four), ("mask_block", c_int64), ("softcap", c_float), ("slopes", c_void_p),
        ("sinks", c_void_p), ("dropout", c_float), ("seed", c_uint64), ("threads", c_int),
    ]  # fmt: skip


def strides(x: torch.Tensor) -> tuple[int, ...]:
    """Of a tensor's dimensions, 0 where it repeats."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride()))


def forward(
    q, k, v, mask=None, offsets=(None, None), *, scale=None, left=-1, right=-1, to_end=False, softcap=0.0,
    slopes=None, sinks=None, dropout=0.0, seed=0, block_mask=None, mask_block=128, arch=800, out=None,
):  # fmt: skip
    """out, lse, and what the call was given: (args, the tensors that it reads)."""
    (batch, heads, q_len, dim), v_dim = q.shape, v.shape[-1]
    if out is None:
        out = torch.empty((batch, heads, q_len, v_dim), dtype=q.dtype)
    out.fill_(float("nan"))
    lse = torch.full((batch, heads, q_len), float("nan"))
    args = AttentionArgs(
        batch=batch if offsets[0] is None else len(offsets[0]) - 1, heads=heads, kv_heads=k.shape[1],
        q_len=q_len, k_len=k.shape[2], head_dim=dim, v_dim=v_dim, q=pointer(q), k=pointer(k), v=pointer(v),
        out=pointer(out), dtype=DTYPES[q.dtype], lse=pointer(lse), q_offsets=pointer(offsets[0]),
        k_offsets=pointer(offsets[1]), scale=dim**-0.5 if scale is None else scale, left=left, right=right,
        to_end=to_end, mask=pointer(mask), softcap=softcap, slopes=pointer(slopes), sinks=pointer(sinks),
        block_mask=pointer(block_mask), mask_block=mask_block, dropout=dropout, seed=seed or 0, threads=1,
    )  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        setattr(args, f"{name}_strides", Three(*x.stride()[:3]))
    if mask is not None:
        args.mask_strides, args.mask_is_bool = Four(*strides(mask)), mask.dtype == torch.bool
    if block_mask is not None:
        args.block_mask_strides = Four(*strides(block_mask))
    read = [q, k, v, mask, *offsets, slopes, sinks, block_mask]
    emulator(arch).run("memlm_cuda_attention", byref(args), read=read, written=[out, lse])
    return out, lse, (args, read)


class AttentionGrads(Structure):
    """memlm_attention_grads"""

    _fields_ = [
        *((name, c_void_p) for name in "grad_out grad_q grad_k grad_v".split()),
        *((f"{name}_strides", Three) for name in "grad_out grad_q grad_k grad_v".split()),
        ("grad_mask", c_void_p), ("grad_sinks", c_void_p),
    ]  # fmt: skip


def backward(grad, q, k, v, mask=None, offsets=(None, None), arch=800, **options) -> dict[str, torch.Tensor]:
    """The gradients of q, k, v, and of mask and sinks where they have some, by name."""
    made = forward(q, k, v, mask, offsets, arch=arch, **options)
    return gradients(grad, q, k, v, made, mask, options.get("sinks"), arch)


def gradients(grad, q, k, v, made, mask=None, sinks=None, arch=800) -> dict[str, torch.Tensor]:
    """As backward, of what forward has ``made``."""
    out, lse, (args, read) = made
    results = {name: torch.full_like(x, float("nan")) for name, x in (("q", q), ("k", k), ("v", v))}
    if mask is not None and mask.is_floating_point():
        results["mask"] = torch.full((*q.shape[:3], k.shape[2]), float("nan"))
    if sinks is not None:
        results["sinks"] = torch.full_like(sinks, float("nan"))
    grads = AttentionGrads(
        grad_out=pointer(grad), **{f"grad_{name}": pointer(x) for name, x in results.items()}
    )
    for name, x in (("out", grad), *((name, results[name]) for name in "qkv")):
        setattr(grads, f"grad_{name}_strides", Three(*x.stride()[:3]))
    emulator(arch).run(
        "memlm_cuda_attention_backward", byref(args), byref(grads), read=[*read, out, lse, grad],
        written=list(results.values()),
    )  # fmt: skip
    if "mask" in results:
        results["mask"] = results["mask"].sum_to_size(mask.shape)
    return results
