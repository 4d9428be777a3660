"""``kv_append``: keys and values of new tokens into the blocks of a paged cache."""

from __future__ import annotations

import torch

from memlm import kv_formats
from memlm.kv_formats import KvFormat
from memlm.ops._matmul import X_DTYPES
from memlm.ops._registry import define


def format_of(type: int, block_tokens: int, dim: int) -> KvFormat:
    """The format of these arguments of an op, or ValueError."""
    if not 0 <= type < len(kv_formats.TYPES):
        raise ValueError(f"type: got {type}, accepted are 0 to {len(kv_formats.TYPES) - 1}")
    return KvFormat(kv_formats.TYPES[type], block_tokens, dim)


def check_heads(name: str, x: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless x is ``[tokens, heads, head_dim]``."""
    if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else x.__class__.__name__
        raise TypeError(f"{name}: got {got}, accepted are tensors of {X_DTYPES}")
    if x.dim() != 3:
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected [tokens, heads, head_dim]")


def check_paged(
    pool, tails, rows, lengths, tables, tail_of, type, block_tokens, dim
) -> KvFormat:
    """What both ops of the cache check by shape and dtype alone.  Returns the format."""
    format = format_of(type, block_tokens, dim)
    for name, x in (("tails", tails), ("tail_of", tail_of)):
        if (x is not None) != (format.tail is not None):
            raise ValueError(f"{name}: int4 has tails, other types have not")
    for name, x, dtype, dims in (
        ("pool", pool, torch.uint8, 3), ("rows", rows, torch.int64, 1),
        ("lengths", lengths, torch.int64, 1), ("tables", tables, torch.int32, 2),
        ("tails", tails, torch.uint8, 3), ("tail_of", tail_of, torch.int32, 1),
    ):  # fmt: skip
        if format.tail is None and name.startswith("tail"):
            continue
        if not isinstance(x, torch.Tensor) or x.dtype != dtype:
            got = x.dtype if isinstance(x, torch.Tensor) else x.__class__.__name__
            raise TypeError(f"{name}: got {got}, expected a tensor of {dtype}")
        if x.dim() != dims or x.device != pool.device:
            raise ValueError(
                f"{name}: got shape {list(x.shape)} on {x.device}, expected {dims} dimensions on "
                f"{pool.device}"
            )
    for name, x, of in (("pool", pool, format), ("tails", tails, format.tail)):
        if of and (x.shape[0] != pool.shape[0] or x.shape[2] != of.block_bytes or not x.is_contiguous()):
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, expected a contiguous "
                f"[kv_heads, blocks, {of.block_bytes}]"
            )
    count = lengths.shape[0]
    for name, x, size in (
        ("rows", rows, count + 1), ("tables", tables, count), ("tail_of", tail_of, count),
    ):  # fmt: skip
        if x is not None and x.shape[0] != size:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}, expected {size} for {count} sequences"
            )
    return format


def check_sequences(
    rows, lengths, tables, tokens, blocks, block_tokens, tail_of=None, tails=None, window=0
) -> list[range]:
    """The tokens that are new in each sequence; ValueError where what is asked for is not in the
    tables, or the tables are not in the pool."""
    if tail_of is not None and ((tail_of < 0) | (tail_of >= tails.shape[1])).any():
        raise ValueError(f"tail_of: got {tail_of.tolist()}, there are {tails.shape[1]} tails")
    starts, ends, new = rows.tolist(), lengths.tolist(), []
    if starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(f"rows: got {starts}, expected to go from 0 to {tokens}")
    for i, end in enumerate(ends):
        count = starts[i + 1] - starts[i]
        if not 0 <= count <= end:
            raise ValueError(f"rows, lengths: sequence {i} has {count} new of {end} tokens")
        new.append(range(end - count, end))
        if count == 0:
            continue
        if end > tables.shape[1] * block_tokens:
            raise ValueError(
                f"tables: {tables.shape[1]} blocks do not hold the {end} tokens of sequence {i}"
            )
        first = max(0, end - count - window + 1) if window else 0
        used = tables[i, first // block_tokens : -(-end // block_tokens)]
        if ((used < 0) | (used >= blocks)).any():
            raise ValueError(
                f"tables: got {used.tolist()} for sequence {i}, the pool has {blocks} blocks"
            )
    return new


def _check(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens) -> KvFormat:
    check_heads("k", k)
    format = check_paged(
        pool, tails, rows, lengths, tables, tail_of, type, block_tokens, k.shape[2]
    )
    check_heads("v", v)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(
            f"v: got {v.dtype} {list(v.shape)}, expected {k.dtype} {list(k.shape)}, as k"
        )
    if k.shape[1] != pool.shape[0]:
        raise ValueError(f"k: got {k.shape[1]} heads, the pool has {pool.shape[0]}")
    return format


def _reference(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens):
    format = _check(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens)
    # window 1: only the blocks of the new tokens are looked at
    sizes = (k.shape[0], pool.shape[1], block_tokens)
    new = check_sequences(rows, lengths, tables, *sizes, tail_of, tails, window=1)
    row = 0
    for i, tokens in enumerate(new):
        for t in tokens:
            block, slot = tables[i, t // block_tokens], t % block_tokens
            pool[:, block] = _with_token(format, pool[:, block], slot, k[row], v[row])
            if format.tail:
                padding = (0, format.width - format.dim)
                both = (
                    kv_formats.hadamard(torch.nn.functional.pad(x[row].float(), padding))
                    for x in (k, v)
                )
                tails[:, tail_of[i]] = _with_token(format.tail, tails[:, tail_of[i]], slot, *both)
            row += 1


def _with_token(format: KvFormat, blocks, slot: int, k, v) -> torch.Tensor:
    """``blocks [kv_heads, bytes]`` with another key and value ``[kv_heads, dim]`` in a slot."""
    parts = kv_formats.unpack(format, blocks)
    for x, to, scales, bits in (
        (k, parts.keys, parts.key_scales, format.bits[0]),
        (v, parts.values, parts.value_scales, format.bits[1]),
    ):
        if format.quantized:
            to[:, slot], scales[:, slot] = kv_formats.quantize(format, x, bits)
        else:
            padded = torch.nn.functional.pad(x, (0, to.shape[2] - format.dim))
            to[:, slot] = padded.to(to.dtype)
    return kv_formats.pack(format, parts)


def _fake(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens):
    _check(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens)


_op = define("kv_append", _reference, _fake)


def kv_append(
    pool: torch.Tensor,
    tails: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    tail_of: torch.Tensor | None,
    type: int,
    block_tokens: int,
) -> None:
    """Stores the keys and values of new tokens, ``k`` and ``v [T, kv_heads, head_dim]`` (f32, bf16,
    f16), in ``pool``, uint8 ``[kv_heads, blocks, block_bytes]``, in place.

    ``type`` 0 to 3 is f32, bf16, int8, int4; memlm/kv_formats.py draws a block.  New tokens
    ``rows[s] .. rows[s + 1] - 1`` (int64 ``[n + 1]``) are the last of the ``lengths[s]`` (int64
    ``[n]``) of sequence s, whose token t is in block ``tables[s, t // block_tokens]`` (int32
    ``[n, most blocks]``).  int4 has ``tails``, uint8 ``[kv_heads, tails, tail_bytes]``, where the
    newest block of sequence s is number ``tail_of[s]`` (int32 ``[n]``) and takes the new tokens as
    well; None otherwise.  Tokens are rounded one by one: what is stored does not depend on how many
    come at once, nor on the number of threads.  No two sequences may write to one block.

    Time and traffic are those of the new tokens.  No gradient.  Raises TypeError or ValueError naming
    the argument that does not fit; nothing is written then.
    """
    args = (pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens)
    try:
        _op(*args)
    except Exception:
        _check(*args)
        sizes = (k.shape[0], pool.shape[1], block_tokens)
        check_sequences(rows, lengths, tables, *sizes, tail_of, tails, window=1)
        raise
