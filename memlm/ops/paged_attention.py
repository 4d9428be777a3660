"""``paged_attention``: attention of new tokens over a paged cache, whose blocks are read as they are."""

from __future__ import annotations

import math

import torch

from memlm import kv_formats
from memlm.kv_formats import KvFormat
from memlm.ops._matmul import quantize_activations
from memlm.ops._registry import define
from memlm.ops.kv_append import check_heads, check_paged, check_sequences


def _check(
    q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap,
    slopes, sinks,
) -> KvFormat:  # fmt: skip
    check_heads("q", q)
    format = check_paged(
        pool, tails, rows, lengths, tables, tail_of, type, block_tokens, q.shape[2]
    )
    heads, kv_heads = q.shape[1], pool.shape[0]
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"q: got {heads} heads, expected a multiple of the pool's {kv_heads}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    if window < 0:
        raise ValueError(f"window: got {window}, accepted is 0 (none) or above")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap: got {softcap}, accepted is 0 (none) or above")
    for name, x in (("slopes", slopes), ("sinks", sinks)):
        if x is not None and (x.dtype != torch.float32 or tuple(x.shape) != (heads,)):
            raise ValueError(
                f"{name}: got {x.dtype} {list(x.shape)}, expected torch.float32 {[heads]}"
            )
    return format


def stored(format: KvFormat, pool, tails, table, tail, first: int, end: int, dtype: torch.dtype):
    """Keys and values ``[kv_heads, end - first, size]`` of tokens first .. end - 1 of a sequence of
    ``end``, as :func:`queries` and their results are: of int8 and int4 after the Hadamard transform.
    Keys of int4 have twice the channels: of tokens in the tail, number ``tail``, the first half is
    zero, of others the second."""
    start = first // format.tokens * format.tokens
    blocks = table[start // format.tokens : -(-end // format.tokens)].long()
    parts = kv_formats.unpack(format, pool[:, blocks])
    keys, values = (x.to(dtype).flatten(1, 2) for x in (parts.keys, parts.values))
    if format.quantized:
        keys = kv_formats.rotated(format, parts.keys, parts.key_scales, format.bits[0], dtype)
        values = kv_formats.rotated(format, parts.values, parts.value_scales, format.bits[1], dtype)
        keys, values = keys.flatten(1, 2), values.flatten(1, 2)
    if format.tail and len(blocks):
        unrounded = kv_formats.unpack(format.tail, tails[:, tail])
        newest = slice(keys.shape[1] - format.tokens, None)
        keys = torch.cat((keys, torch.zeros_like(keys)), dim=-1)
        keys[:, newest, : format.width] = 0
        keys[:, newest, format.width :] = unrounded.keys.to(dtype)
        values[:, newest] = unrounded.values.to(dtype)
    return keys[:, first - start : end - start], values[:, first - start : end - start]


def queries(format: KvFormat, q: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``q [T, H, D]`` times scale, as the kernels multiply it with keys: for int8 and int4 after the
    Hadamard transform, rounded to int8 with a scale for each group of channels, which for int4 the
    unrounded ones follow."""
    x = q.float() * scale
    if format.quantized:
        x = kv_formats.hadamard(torch.nn.functional.pad(x, (0, format.width - format.dim)))
        codes, scales = quantize_activations(x.flatten(0, 1), format.group)
        rounded = (codes.to(dtype) * scales.to(dtype)).flatten(1).view(x.shape)
        x = torch.cat((rounded, x.to(dtype)), dim=-1) if format.tail else rounded
    return x.to(dtype)


def _reference(
    q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap,
    slopes, sinks,
):  # fmt: skip
    format = _check(
        q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap,
        slopes, sinks,
    )  # fmt: skip
    sizes = (q.shape[0], pool.shape[1], block_tokens)
    new = check_sequences(rows, lengths, tables, *sizes, tail_of, tails, window)
    x, group = queries(format, q, scale, torch.float32), q.shape[1] // pool.shape[0]
    out, row = torch.empty_like(q, memory_format=torch.contiguous_format), 0
    for i, tokens in enumerate(new):
        if not tokens:
            continue
        first = max(0, tokens.start - window + 1) if window else 0
        tail = None if tail_of is None else tail_of[i]
        keys, values = (
            part.repeat_interleave(group, dim=0)
            for part in stored(
                format, pool, tails, tables[i], tail, first, tokens.stop, torch.float32
            )
        )
        here = slice(row, row + len(tokens))
        scores = x[here].transpose(0, 1) @ keys.transpose(1, 2)
        if softcap > 0:
            scores = softcap * (scores / softcap).tanh()
        position = torch.arange(tokens.start, tokens.stop, device=q.device)
        distance = position[:, None] - torch.arange(first, tokens.stop, device=q.device)
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        seen = (distance >= 0) & (distance < window) if window else distance >= 0
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            column = sinks[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(-1)[..., : keys.shape[1]]
        result = weights @ values
        if format.quantized:
            result = kv_formats.hadamard(result)
        out[here] = result[..., : format.dim].transpose(0, 1).to(q.dtype)
        row += len(tokens)
    return out


def _fake(
    q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap,
    slopes, sinks,
):  # fmt: skip
    _check(
        q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap,
        slopes, sinks,
    )  # fmt: skip
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_op = define("paged_attention", _reference, _fake)


def paged_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    tails: torch.Tensor | None,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    tail_of: torch.Tensor | None,
    type: int,
    block_tokens: int,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of new tokens, ``q [T, heads, head_dim]`` (f32, bf16, f16), over what
    ``pool`` holds of their sequences, themselves included (:func:`kv_append`, which also says what
    the other arguments before ``scale`` are); returns q's shape and dtype.

    Query head h reads key-value head ``h // (heads / kv_heads)``.  ``scale`` is by default
    ``head_dim ** -0.5``.  ``window``: tokens that a query sees, itself included, 0 for all; table
    entries of blocks wholly outside may hold anything.  ``softcap`` above 0 makes of scores s
    ``softcap * tanh(s / softcap)``; ``slopes``, f32 ``[heads]``, then subtracts slope times distance
    (ALiBi, arXiv:2108.12409); ``sinks``, f32 ``[heads]``, is the score of one more key, without a
    value (arXiv:2309.17453).

    Sums are f32, in one pass over the blocks with a running maximum (arXiv:2205.14135), and the
    result does not depend on the number of threads.  Over int8 and int4 products are of integers:
    queries are rounded to int8 with a scale for each group of channels, and so are softmax weights
    times the values' scales, one for each block.  Tails are multiplied as they are, in f32: new tokens
    before a sequence's newest block find their own rounded, so that a step that goes beyond the end of
    a block is better passed block by block (:meth:`memlm.kv_cache.PagedKVCache.attend` does).

    Time is that of reading the blocks seen where rows are few; memory beside the result is O(T).  No
    gradient.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    check_heads("q", q)
    if scale is None:
        scale = q.shape[2] ** -0.5
    args = (
        q, pool, tails, rows, lengths, tables, tail_of, type, block_tokens, scale, window, softcap,
        slopes, sinks,
    )  # fmt: skip
    try:
        return _op(*args)
    except Exception:
        _check(*args)
        sizes = (q.shape[0], pool.shape[1], block_tokens)
        check_sequences(rows, lengths, tables, *sizes, tail_of, tails, window)
        raise
