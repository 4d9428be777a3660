"""The paged cache's CUDA functions, called through the emulator with what the ops in tests/paged.py take."""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p

import torch


from .emulator import DTYPES, emulator, pointer


class Pool(Structure):
    """memlm_kv_pool"""

    _fields_ = [
        ("blocks", c_void_p), ("count", c_int64), ("block_tokens", c_int64), ("kv_heads", c_int64),
        ("head_dim", c_int64), ("type", c_int), ("tails", c_void_p), ("tail_count", c_int64),
    ]  # fmt: skip


class Sequences(Structure):
    """memlm_sequences"""

    _fields_ = [
        ("count", c_int64), ("rows", c_void_p), ("lengths", c_void_p), ("tables", c_void_p),
        ("table_stride", c_int64), ("tails", c_void_p),
    ]  # fmt: skip


class PagedAttentionArgs(Structure):
    """memlm_paged_attention_args"""

    _fields_ = [
        ("q", c_void_p), ("q_stride", c_int64), ("out_stride", c_int64), ("out", c_void_p),
        ("heads", c_int64), ("dtype", c_int), ("scale", c_float), ("window", c_int64),
        ("softcap", c_float), ("slopes", c_void_p), ("sinks", c_void_p), ("threads", c_int),
    ]  # fmt: skip


class Bounds(Structure):
    """memlm_cuda_bounds"""

    _fields_ = [("rows", c_int64), ("longest", c_int64)]


class Rope(Structure):
    """memlm_cuda_rope"""

    _fields_ = [
        ("q", c_void_p), ("turned", c_void_p), ("q_stride", c_int64), ("turned_stride", c_int64),
        ("heads", c_int64), ("cos", c_void_p), ("sin", c_void_p), ("angle_stride", c_int64),
        ("positions", c_void_p),
    ]  # fmt: skip


def _row_stride(x: torch.Tensor) -> int:
    return x.stride(0) if len(x) > 1 else x[:1].numel()


def _cache(pool, tails, rows, lengths, tables, tail_of, type, block_tokens, dim):
    return (
        Pool(
            pointer(pool), pool.shape[1], block_tokens, pool.shape[0], dim, type, pointer(tails),
            0 if tails is None else tails.shape[1],
        ),
        Sequences(
            len(lengths), pointer(rows), pointer(lengths), pointer(tables), tables.shape[1],
            pointer(tail_of),
        ),
    )  # fmt: skip


def kv_append(
    pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens, *, arch=800, spare=0,
    rope=None,
):  # fmt: skip
    """As the op.  ``spare``: how many more rows than there are the host thinks of.  ``rope``: a dict of
    cos, sin and, if wanted, q [rows, heads, dim], which is turned in place, and positions."""
    cache, sequences = _cache(pool, tails, rows, lengths, tables, tail_of, type, block_tokens, k.shape[2])
    read, written = [k, v, rows, lengths, tables, tail_of], [pool, tails]
    arguments = [
        byref(cache), byref(sequences), c_void_p(pointer(k)), c_void_p(pointer(v)),
        c_int64(_row_stride(k)), DTYPES[k.dtype], byref(Bounds(len(k) + spare, 0)),
    ]  # fmt: skip
    if rope is None:
        return emulator(arch).run("memlm_cuda_kv_append", *arguments, read=read, written=written)
    q, cos, sin, positions = (rope.get(name) for name in ("q", "cos", "sin", "positions"))
    stride = 0 if q is None else _row_stride(q)
    turn = Rope(
        pointer(q), pointer(q), stride, stride, 0 if q is None else q.shape[1], pointer(cos), pointer(sin),
        cos.stride(0), pointer(positions),
    )  # fmt: skip
    read, written = [*read, cos, sin, positions], [*written, q]
    emulator(arch).run("memlm_cuda_rope_kv_append", *arguments, byref(turn), read=read, written=written)


def paged_attention(
    q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap, slopes,
    sinks, *, arch=800, longest=0, spare=0,
):  # fmt: skip
    """As the op."""
    cache, sequences = _cache(pool, tails, rows, lengths, tables, tail_of, type, block_tokens, q.shape[2])
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    args = PagedAttentionArgs(
        pointer(q), _row_stride(q), out.stride(0), pointer(out), q.shape[1], DTYPES[q.dtype], scale, window,
        softcap, pointer(slopes), pointer(sinks), 1,
    )  # fmt: skip
    emulator(arch).run(
        "memlm_cuda_paged_attention", byref(cache), byref(sequences), byref(args),
        byref(Bounds(len(q) + spare, longest)),
        read=[q, pool, tails, rows, lengths, tables, tail_of, slopes, sinks], written=[out],
    )  # fmt: skip
    return out
