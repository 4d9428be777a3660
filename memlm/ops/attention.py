"""``attention``: softmax(q k^T) v in memory that grows with the sequence, not with its square."""

from __future__ import annotations

import math

import torch

from memlm.ops._matmul import X_DTYPES, register_autocast
from memlm.ops._registry import define

MOST_DIM = 512
MASK_BLOCK_UNIT = 32
GOLDEN_RATIO, MASK32 = 0x9E3779B9, 0xFFFFFFFF


def _check(
    q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, slopes, sinks, dropout, seed
) -> None:
    """Raises TypeError or ValueError naming the argument of the op that does not fit."""
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    for name, x, shape in (
        ("key", k, (batch, kv_heads, k_len, dim)),
        ("value", v, (batch, kv_heads, k_len, v_dim)),
    ):
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(
                f"{name}: got {x.dtype} on {x.device}, expected {q.dtype} on {q.device}, as query"
            )
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected {list(shape)}")
    for name, size in (("query", dim), ("value", v_dim)):
        if not 1 <= size <= MOST_DIM:
            raise ValueError(f"{name}: got a last dimension of {size}, accepted is 1 to {MOST_DIM}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"key: got {kv_heads} heads, expected a divisor of query's {heads}")
    if mask is not None:
        if mask.dtype not in (torch.bool, q.dtype):
            raise TypeError(f"attn_mask: got {mask.dtype}, accepted are torch.bool and {q.dtype}")
        sizes = (batch, heads, q_len, k_len)
        if mask.dim() != 4 or any(m not in (1, n) for m, n in zip(mask.shape, sizes)):
            raise ValueError(
                f"attn_mask: got shape {list(mask.shape)}, expected what broadcasts to {list(sizes)}"
            )
        if q_offsets is not None:
            raise ValueError("attn_mask: is not for packed sequences")
    if block_mask is not None:
        _check_block_mask(block_mask, mask_block, q, k_len)
        if q_offsets is not None:
            raise ValueError("block_mask: is not for packed sequences")
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, x in (("slopes", slopes), ("sinks", sinks)):
        if x is not None and (x.dtype != exact or tuple(x.shape) != (heads,)):
            raise ValueError(f"{name}: got {x.dtype} {list(x.shape)}, expected {exact} {[heads]}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout_p: got {dropout}, accepted is 0 to below 1")
    if dropout and seed is None:
        raise ValueError("seed: dropout needs one")
    if (q_offsets is None) != (k_offsets is None):
        raise ValueError("k_offsets: is given with q_offsets, and only then")
    if q_offsets is not None:
        for name, x in (("q_offsets", q_offsets), ("k_offsets", k_offsets)):
            if x.dtype != torch.int64 or x.dim() != 1 or x.shape != q_offsets.shape or not len(x):
                raise ValueError(
                    f"{name}: got {x.dtype} {list(x.shape)}, expected int64 [sequences + 1]"
                )


def _check_block_mask(block_mask, size: int, q, k_len: int) -> None:
    if size < MASK_BLOCK_UNIT or size % MASK_BLOCK_UNIT:
        raise ValueError(f"mask_block: got {size}, accepted are multiples of {MASK_BLOCK_UNIT}")
    if block_mask.dtype != torch.bool or block_mask.device != q.device:
        raise TypeError(
            f"block_mask: got {block_mask.dtype} on {block_mask.device}, "
            f"expected torch.bool on {q.device}, as query"
        )
    batch, heads, q_len, _ = q.shape
    sizes = (batch, heads, -(-q_len // size), -(-k_len // size))
    if (
        block_mask.dim() != 4
        or block_mask.shape[2:] != sizes[2:]
        or any(m not in (1, n) for m, n in zip(block_mask.shape, sizes))
    ):
        raise ValueError(
            f"block_mask: got shape {list(block_mask.shape)}, expected {list(sizes)} "
            f"for blocks of {size}, the first two may be 1"
        )


def _check_offsets(name: str, offsets: torch.Tensor, total: int) -> list[int]:
    """``offsets`` as numbers, or ValueError."""
    numbers = offsets.tolist()
    if numbers[0] != 0 or numbers[-1] != total or any(a > b for a, b in zip(numbers, numbers[1:])):
        raise ValueError(f"{name}: got {numbers}, expected to ascend from 0 to {total}")
    return numbers


# Shapes.


def _by_token(like: torch.Tensor, shape, dtype=None) -> torch.Tensor:
    """New ``[B, H, L, D]``, of which the heads of one token lie together."""
    batch, heads, length, dim = shape
    return like.new_empty((batch, length, heads, dim), dtype=dtype).transpose(1, 2)


def _fake(
    q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, scale, left, right, to_end,
    softcap, slopes, sinks, dropout, seed,
):  # fmt: skip
    _check(
        q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, slopes, sinks, dropout, seed
    )
    out = _by_token(q, (*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(
    grad_out, q, k, v, out, lse, mask, block_mask, mask_block, q_offsets, k_offsets, scale, left,
    right, to_end, softcap, slopes, sinks, dropout, seed, want_mask,
):  # fmt: skip
    dmask = (*q.shape[:3], k.shape[2]) if want_mask else (0,)
    return (
        _by_token(q, q.shape),
        _by_token(k, k.shape),
        _by_token(v, v.shape),
        q.new_empty(dmask, dtype=torch.float32),
        q.new_empty(0 if sinks is None else q.shape[1], dtype=torch.float32),
    )


# The computation in plain torch, matrix and all.


def _mix(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 of int64 x, 0 to 2^32 - 1."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & MASK32
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & MASK32
    return x ^ (x >> 16)


def dropout_factors(
    seed: torch.Tensor, sequences: torch.Tensor, heads: int, q_len: int, k_len: int, p: float
) -> torch.Tensor:
    """f64 [sequences, heads, q_len, k_len]: 0 with probability p, elsewhere 1 / (1 - p).

    All numbers are of 32 bits, ``mix`` is the hash lowbias32 (C. Wellons' hash prospector).  A
    query's key is r = 0, then ``r = mix((r ^ word) + 0x9E3779B9)`` for the words: lower and upper
    half of the seed, batch entry (or sequence), query head, query of its sequence.  Key j of its
    sequence is dropped where ``mix(r + j * 0x9E3779B9) < floor(p * 2^32)``, for p as an f32.
    """
    device = sequences.device
    seed = seed.to(device)
    p = torch.tensor(p, dtype=torch.float32).item()
    row = torch.zeros((), dtype=torch.int64, device=device)
    head, query, key = (torch.arange(n, device=device) for n in (heads, q_len, k_len))
    words = (seed & MASK32, seed >> 32 & MASK32, sequences[:, None, None], head[:, None], query)
    for word in words:
        row = _mix((row ^ word) + GOLDEN_RATIO & MASK32)
    hashes = _mix(row[..., None] + key * GOLDEN_RATIO & MASK32)
    return (hashes >= math.floor(p * 2**32)).double() / (1 - p)


def block_mask_elements(
    block_mask: torch.Tensor, mask_block: int, q_len: int, k_len: int
) -> torch.Tensor:
    """[B, H, q_len, k_len] of a block mask [B, H, ceil(q_len / mask_block), ceil(k_len /
    mask_block)]: every block's value at all its elements."""
    rows = block_mask.repeat_interleave(mask_block, -2)[..., :q_len, :]
    return rows.repeat_interleave(mask_block, -1)[..., :k_len]


class _Matrices:
    """Of one batch, all in f32, or f64 for f64: ``p [B, H, L, S]`` probabilities, ``kept`` what
    dropout multiplies them with (1: nothing), ``slope`` of the soft-cap (1: none), ``lse``."""

    def __init__(
        self, q, k, mask, block_mask, mask_block, sequences, scale, left, right, to_end, softcap,
        slopes, sinks, dropout, seed,
    ):  # fmt: skip
        heads, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
        scores = scale * (q @ k.transpose(-1, -2))
        self.slope = 1.0
        if softcap > 0:
            capped = (scores / softcap).tanh()
            scores, self.slope = softcap * capped, 1 - capped.square()
        position = torch.arange(q_len, device=q.device)[:, None] + (k_len - q_len if to_end else 0)
        distance = torch.arange(k_len, device=q.device) - position
        if slopes is not None:
            scores = scores - slopes.to(q.dtype)[:, None, None] * distance.abs()
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen = seen & (distance >= -left)
        if right >= 0:
            seen = seen & (distance <= right)
        if block_mask is not None:
            seen = seen & block_mask_elements(block_mask, mask_block, q_len, k_len)
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            scores = scores + mask.to(q.dtype)
        scores = scores.masked_fill(~seen, -math.inf)
        every = scores
        if sinks is not None:
            column = sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)
            every = torch.cat((scores, column), dim=-1)
        self.lse = every.logsumexp(-1)
        base = self.lse.masked_fill(self.lse == -math.inf, 0)[..., None]
        self.p, self.kept = (scores - base).exp(), 1.0
        if dropout > 0:
            factors = dropout_factors(seed, sequences, heads, q_len, k_len, dropout)
            self.kept = factors.to(q.dtype)


def _pieces(q, k, q_offsets, k_offsets):
    """(numbers of sequences, their queries, their keys): all of a batch at once, packed ones one by
    one."""
    if q_offsets is None:
        yield torch.arange(q.shape[0], device=q.device), slice(None), slice(None)
        return
    ends = _check_offsets("q_offsets", q_offsets, q.shape[2])
    k_ends = _check_offsets("k_offsets", k_offsets, k.shape[2])
    for i in range(len(ends) - 1):
        number = torch.tensor([i], device=q.device)
        yield number, slice(ends[i], ends[i + 1]), slice(k_ends[i], k_ends[i + 1])


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    return _exact(x).repeat_interleave(heads // x.shape[1], dim=1)


def _reference(
    q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, scale, left, right, to_end,
    softcap, slopes, sinks, dropout, seed,
):  # fmt: skip
    _check(
        q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, slopes, sinks, dropout, seed
    )
    heads = q.shape[1]
    rules = (scale, left, right, to_end, softcap, slopes, sinks, dropout, seed)
    exact_q, exact_k, exact_v = _exact(q), _repeated(k, heads), _repeated(v, heads)
    out = _by_token(exact_q, (*q.shape[:3], v.shape[3]))
    lse = exact_q.new_empty(q.shape[:3])
    for number, rows, keys in _pieces(q, k, q_offsets, k_offsets):
        here = exact_q[:, :, rows], exact_k[:, :, keys]
        m = _Matrices(*here, mask, block_mask, mask_block, number, *rules)
        out[:, :, rows] = m.p * m.kept @ exact_v[:, :, keys]
        lse[:, :, rows] = m.lse
    return _by_token(q, out.shape).copy_(out), lse


def _backward_reference(
    grad_out, q, k, v, out, lse, mask, block_mask, mask_block, q_offsets, k_offsets, scale, left,
    right, to_end, softcap, slopes, sinks, dropout, seed, want_mask,
):  # fmt: skip
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    rules = (scale, left, right, to_end, softcap, slopes, sinks, dropout, seed)
    exact_q, exact_k, exact_v = _exact(q), _repeated(k, heads), _repeated(v, heads)
    grad = grad_out.to(exact_q.dtype)
    delta = (grad * out).sum(-1, keepdim=True)
    dq, dk, dv = (torch.empty_like(x) for x in (exact_q, exact_k, exact_v))
    dmask = exact_q.new_empty(0)
    for number, rows, keys in _pieces(q, k, q_offsets, k_offsets):
        here = exact_q[:, :, rows], exact_k[:, :, keys], exact_v[:, :, keys], grad[:, :, rows]
        m = _Matrices(*here[:2], mask, block_mask, mask_block, number, *rules)
        dp = here[3] @ here[2].transpose(-1, -2) * m.kept
        dscores = m.p * (dp - delta[:, :, rows])
        dv[:, :, keys] = (m.p * m.kept).transpose(-1, -2) @ here[3]
        if want_mask:
            dmask = dscores
        dscores = dscores * m.slope * scale
        dq[:, :, rows] = dscores @ here[1]
        dk[:, :, keys] = dscores.transpose(-1, -2) @ here[0]
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    dsinks = exact_q.new_empty(0)
    if sinks is not None:
        share = (sinks.to(lse.dtype)[:, None] - lse).exp()
        dsinks = -(share[..., None] * delta).sum((0, 2, 3))
    grads = tuple(_by_token(q, x.shape).copy_(x) for x in (dq, dk, dv))
    return *grads, dmask, dsinks


# The ops.

_op_backward = define("attention_backward", _backward_reference, _backward_fake)


def _setup_context(ctx, inputs, output):
    q, k, v, mask, block_mask, ctx.mask_block, q_offsets, k_offsets, *rest = inputs
    scale, left, right, to_end, softcap, slopes, sinks, dropout, seed = rest
    ctx.save_for_backward(
        q, k, v, *output, mask, block_mask, q_offsets, k_offsets, slopes, sinks, seed
    )
    ctx.rules = scale, left, right, to_end, softcap, dropout
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    *tensors, q_offsets, k_offsets, slopes, sinks, seed = ctx.saved_tensors
    *rules, dropout = ctx.rules
    mask, want_mask = tensors[5], ctx.needs_input_grad[3]
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    dq, dk, dv, dmask, dsinks = _op_backward(
        grad_out, *tensors, ctx.mask_block, q_offsets, k_offsets, *rules, slopes, sinks, dropout,
        seed, want_mask,
    )  # fmt: skip
    dmask = dmask.sum_to_size(mask.shape).to(mask.dtype) if want_mask else None
    return dq, dk, dv, dmask, *(None,) * 10, None if sinks is None else dsinks, None, None


_op = define("attention", _reference, _fake, _backward, _setup_context)
register_autocast(_op, (0, 1, 2, 3))


# What is called.


def _limits(window, is_causal: bool) -> tuple[int, int]:
    """left and right of the op: negative for no limit."""
    if window is None:
        left, right = -1, -1
    elif isinstance(window, int) and not isinstance(window, bool) and window >= 1:
        left, right = window - 1, 0
    elif isinstance(window, tuple) and len(window) == 2 and all(isinstance(w, int) for w in window):
        left, right = window
    else:
        raise ValueError(
            f"window: got {window!r}, accepted are a number of keys from 1, (left, right), None"
        )
    return left, 0 if is_causal else right


def _prepare(query, key, value, dropout_p, scale, slopes, sinks, seed):
    """Checks what all calls share.  Returns scale and seed as the op takes them."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name}: got {got}, accepted are tensors of {X_DTYPES}")
    if slopes is not None and slopes.requires_grad:
        raise ValueError("slopes: requires a gradient, and has none here")
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, ())
    else:
        seed = torch.tensor(seed, dtype=torch.int64)
    return query.shape[-1] ** -0.5 if scale is None else scale, seed


def _four(x: torch.Tensor, batch: tuple[int, ...]) -> torch.Tensor:
    """``[..., H, L, D]`` as ``[B, H, L, D]``, its batch dimensions expanded to ``batch``."""
    if len(batch) == 1 and x.dim() == 4 and x.shape[0] == batch[0]:
        return x
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])


def _four_mask(name: str, mask, query: torch.Tensor, batch: tuple[int, ...]):
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected a tensor")
    if mask.dim() > len(batch) + 3:
        raise ValueError(f"{name}: got {mask.dim()} dimensions, query has {query.dim()}")
    mask = mask[(None,) * (3 - mask.dim())]
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    try:
        return _four(mask, batch)
    except RuntimeError:
        raise ValueError(
            f"{name}: got shape {list(mask.shape)}, "
            f"its first dimensions must broadcast to {list(batch)}"
        ) from None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | tuple[int, int] | None = None,
    to_end: bool = False,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    seed: int | None = None,
    block_mask: torch.Tensor | None = None,
    mask_block: int = 128,
) -> torch.Tensor:
    """``softmax(scale * query key^T + bias) value``, with the arguments of
    ``torch.nn.functional.scaled_dot_product_attention`` and more; exact, in memory of the order of
    the sequence, forward and backward (arXiv:2112.05682, arXiv:2205.14135).

    query ``[..., H, L, E]``, key ``[..., Hk, S, E]``, value ``[..., Hk, S, Ev]``: f32, bf16 or f16,
        of any strides; E and Ev 1 to 512; the first dimensions broadcast.  Returns
        ``[..., H, L, Ev]`` in query's dtype.  Scores and sums are f32.
    attn_mask: broadcasts to ``[..., H, L, S]``.  bool: True where the query sees the key; else of
        query's dtype (f32 is cast to it) and added to the scores.
    dropout_p: share of the probabilities set to zero, the others grow by 1 / (1 - dropout_p).
        :func:`dropout_factors` specifies which, by ``seed``; None: drawn from torch's generator.
    is_causal: query i sees the keys up to i, or with ``to_end`` up to i + S - L: the last query
        stands at the last key, as after a cache.  With a mask as well, both hold.
    scale: None is E ** -0.5.
    enable_gqa: Hk may be a divisor of H; H / Hk query heads share a key head (arXiv:2305.13245).
    window: (left, right): the query at position p sees the keys p - left to p + right, negative
        numbers are no limit; n means (n - 1, 0), the last n keys.
    softcap: above 0, scores s become ``softcap * tanh(s / softcap)`` before mask and slopes.
    slopes: f32 [H]: ``- slope * |p - j|`` is added to the score of key j (ALiBi, arXiv:2108.12409).
    sinks: f32 [H], a further score for each head, of a key without value (arXiv:2309.17453).
    block_mask: bool, of blocks of ``mask_block`` queries by ``mask_block`` keys (arXiv:1904.10509):
        ``[..., H, ceil(L / mask_block), ceil(S / mask_block)]``, dimensions before the last two
        broadcast.  False: none of these queries sees any of these keys.  Nothing of the block is
        computed, forward or backward, nor are its keys and values read: the time goes with the
        share that is True.  It holds beside all other limits, and counts queries from the first
        one given, with ``to_end`` too.
    mask_block: a multiple of 32.  128 are as many keys as the kernel takes at a time; of 64 it
        packs keys and values twice as often, for some percent of the time, of 32 four times.

    A query that sees no key gives zeros, where torch's kernels differ.  NaN reaches every row that
    sees it.  Differentiable in query, key, value, attn_mask, sinks; on devices without a kernel the
    plain torch reference runs, with a warning.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    scale, seed = _prepare(query, key, value, dropout_p, scale, slopes, sinks, seed)
    dims = query.dim()
    if dims < 2 or key.dim() != dims or value.dim() != dims:
        got = [x.dim() for x in (query, key, value)]
        raise ValueError(f"query, key, value: got {got} dimensions, expected as many, at least 2")
    left, right = _limits(window, is_causal)
    if dims == 2:
        query, key, value = query[None], key[None], value[None]
    if not enable_gqa and not query.shape[-3] == key.shape[-3] == value.shape[-3]:
        heads = [x.shape[-3] for x in (query, key, value)]
        if dims == 3 and set(heads) <= {1, max(heads)}:  # the batch, which broadcasts
            query, key, value = (x.expand(max(heads), -1, -1) for x in (query, key, value))
        else:
            raise ValueError(
                f"key: query, key and value have {heads} heads: enable_gqa allows fewer"
            )
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError:
        shapes = [list(x.shape[:-3]) for x in (query, key, value)]
        raise ValueError(f"query, key, value: {shapes} do not broadcast") from None
    if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.float32:
        attn_mask = attn_mask.to(query.dtype)
    mask = _four_mask("attn_mask", attn_mask, query, batch)
    block_mask = _four_mask("block_mask", block_mask, query, batch)
    q, k, v = (_four(x, batch) for x in (query, key, value))
    try:
        out, _ = _op(
            q, k, v, mask, block_mask, mask_block, None, None, scale, left, right, to_end, softcap,
            slopes, sinks, dropout_p, seed,
        )  # fmt: skip
    except Exception:  # the op checks all of this again, after autocast, which may make it fit
        _check(
            q, k, v, mask, block_mask, mask_block, None, None, slopes, sinks, dropout_p, seed
        )
        raise
    if dims == 4:
        return out
    return out[0, 0] if dims == 2 else out.reshape(*batch, *out.shape[-3:])


def attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    window: int | tuple[int, int] | None = None,
    to_end: bool = False,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """:func:`attention` of sequences of unequal length, one after the other: none sees another.

    query ``[T, H, E]``, key ``[Tk, Hk, E]``, value ``[Tk, Hk, Ev]``; Hk is a divisor of H.  Returns
        ``[T, H, Ev]``.
    q_offsets: int64 ``[n + 1]``, from 0 to T: sequence b has the queries ``q_offsets[b]`` to
        ``q_offsets[b + 1] - 1``, and by ``k_offsets`` (None: the same) its keys.

    The other arguments are those of :func:`attention`; positions count from each sequence's start.
    """
    scale, seed = _prepare(query, key, value, dropout_p, scale, slopes, sinks, seed)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected [tokens, heads, size]")
    left, right = _limits(window, is_causal)
    k_offsets = q_offsets if k_offsets is None else k_offsets
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    try:
        out, _ = _op(
            q, k, v, None, None, 0, q_offsets, k_offsets, scale, left, right, to_end, softcap,
            slopes, sinks, dropout_p, seed,
        )  # fmt: skip
    except Exception:
        _check(q, k, v, None, None, 0, q_offsets, k_offsets, slopes, sinks, dropout_p, seed)
        _check_offsets("q_offsets", q_offsets, query.shape[0])
        _check_offsets("k_offsets", k_offsets, key.shape[0])
        raise
    return out[0].transpose(0, 1)
