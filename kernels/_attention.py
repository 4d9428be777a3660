"""What attention and its gradients share: arguments as kernels take them, what a program computes, scores.

A program has OWN rows of one side, queries or keys, and goes through those of the other side that see them,
or are seen, STEP at a time.  Scores are in units of log2.  Steps of which all pairs are within the limits
come first, without comparisons; those at the edges after them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from memlm.kernels import UnsupportedError
from memlm.kernels._targets import Target, fits
from memlm.kernels._weight_only import target_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
GOLDEN_RATIO = tl.constexpr(0x9E3779B9)
FAR = 1 << 29  # no limit; sequences are shorter, and sums of three such numbers fit 32 bits
MOST_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Rules(NamedTuple):
    """What a score depends on, beside query and key, and which there are.  None: on this it does not."""

    heads: int
    group: int  # of query heads that share a head of keys
    q_len: int
    k_len: int
    sequences: int
    q_offsets: torch.Tensor | None  # int64 [sequences + 1]
    k_offsets: torch.Tensor | None
    scale: float  # with log2(e)
    left: int
    right: int
    to_end: int  # 0 or 1
    softcap: float | None
    slopes: torch.Tensor | None  # f32 [heads]
    mask: torch.Tensor | None  # of uint8, 0 where not seen; or of q's dtype, added
    mask_strides: tuple[int, int, int, int] | None
    block_mask: torch.Tensor | None  # uint8
    block_strides: tuple[int, int, int, int] | None
    dropped: int | None  # hashes below it are; of 32 bits, as all of these
    seed_low: int | None
    seed_high: int | None
    kept: float  # what other probabilities are multiplied with


class Place(NamedTuple):
    """What a program computes: rows from ``first`` on of a sequence, of one head."""

    sequence: int
    batch: int
    head: int
    first: int
    q_first: int  # where the sequence begins
    k_first: int
    q_len: int
    k_len: int


class Rows(NamedTuple):
    """Of one head of one sequence: [length, dim]."""

    start: torch.Tensor
    stride: int
    length: int
    dim: int


def _strides(x: torch.Tensor | None) -> tuple[int, ...] | None:
    """0 where a dimension is repeated."""
    return None if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride()))


def _bits32(x: int) -> int:
    """The signed number of the same 32 bits: kernels' arguments then have one type."""
    return (x & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def rules_of(
    q, k, v, mask, block_mask, q_offsets, k_offsets, scale, left, right, to_end, softcap, slopes, dropout,
    seed,
) -> Rules:  # fmt: skip
    """Of ``torch.ops.memlm.attention``'s checked arguments.  A device that has the seed is waited for.

    Raises ValueError for a softcap or scale that is none, UnsupportedError for a dtype, sizes of heads or
    lengths that the kernels do not take.
    """
    batch, heads, q_len, dim = q.shape
    if q.dtype not in DTYPES:
        raise UnsupportedError(f"query: got {q.dtype}, Triton kernels take {DTYPES}")
    for name, size in (("query", dim), ("value", v.shape[3])):
        if size > MOST_DIM:
            raise UnsupportedError(
                f"{name}: got a last dimension of {size}, Triton kernels take 1 to {MOST_DIM}"
            )
    for name, length in (("query", q_len), ("key", k.shape[2])):
        if length >= FAR:
            raise UnsupportedError(f"{name}: got {length} rows, Triton kernels take fewer than {FAR}")
    if not softcap >= 0:
        raise ValueError(f"softcap: got {softcap}, accepted is 0 or above")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, accepted is a finite one")
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if block_mask is not None:
        block_mask = block_mask.view(torch.uint8)
    seed = seed.item() if dropout else None
    return Rules(
        heads, heads // k.shape[1], q_len, k.shape[2], batch if q_offsets is None else len(q_offsets) - 1,
        q_offsets, k_offsets, scale * LOG2E.value, *(min(FAR, n) if n >= 0 else FAR for n in (left, right)),
        int(to_end), softcap or None, slopes, mask, _strides(mask), block_mask, _strides(block_mask),
        _bits32(int(torch.tensor(dropout, dtype=torch.float32).item() * 2**32)) if dropout else None,
        _bits32(seed) if dropout else None, _bits32(seed >> 32) if dropout else None, 1 / (1 - dropout),
    )  # fmt: skip


def dense(x: torch.Tensor) -> torch.Tensor:
    """``x``, its last dimension dense, and of 128 rows none further away than 32 bits say."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 24 else x.contiguous()


def tiles(a: Rules, length: int, own: int) -> int:
    """Programs for a head of ``length`` rows.  With offsets, sequence s has those from floor(offset / own) +
    s on: enough, and some without rows."""
    return triton.cdiv(length, own) if a.q_offsets is None else length // own + a.sequences


def padded(dim: int) -> int:
    """What products are of."""
    return max(16, triton.next_power_of_2(dim))


# ---- What a program computes ----


@triton.jit
def _of_sequence(offsets, s, length):
    """First row and number of rows; within the tensor, whatever the offsets are."""
    first = tl.minimum(tl.maximum(tl.load(offsets + s), 0), length)
    end = tl.minimum(tl.maximum(tl.load(offsets + s + 1), first), length)
    return first.to(tl.int32), (end - first).to(tl.int32)


@triton.jit
def place(a, offsets, length, heads, OWN: tl.constexpr):
    """This program's.  The last rows come first: with causal limits they take longest."""
    count = tl.cdiv(length, OWN) if offsets is None else length // OWN + a.sequences
    tile, rest = count - 1 - tl.program_id(0) % count, tl.program_id(0) // count
    head, batch = rest % heads, rest // heads
    sequence, first = batch, tile * OWN
    q_first, k_first, q_len, k_len = 0, 0, a.q_len, a.k_len
    if offsets is not None:
        sequence = batch * 0
        high = sequence + a.sequences  # sequence's programs begin at or before this one
        while high - sequence > 1:
            middle = (sequence + high) // 2
            before = (tl.load(offsets + middle) // OWN).to(tl.int32) + middle <= tile
            sequence = tl.where(before, middle, sequence)
            high = tl.where(before, high, middle)
        first = tl.maximum(tile - (tl.load(offsets + sequence) // OWN).to(tl.int32) - sequence, 0) * OWN
        q_first, q_len = _of_sequence(a.q_offsets, sequence, a.q_len)
        k_first, k_len = _of_sequence(a.k_offsets, sequence, a.k_len)
    return Place(sequence, batch, head, first, q_first, k_first, q_len, k_len)


@triton.jit
def head_rows(x, strides, batch, head, first):
    """Where rows from ``first`` on begin, of a [batch, heads, rows, dim]."""
    of_head = x + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return of_head + tl.cast(first, tl.int64) * strides[2]


@triton.jit
def queries_of(x, strides, at, head, dim: tl.constexpr):
    """Of a tensor that has a row for each query."""
    return Rows(head_rows(x, strides, at.batch, head, at.q_first), strides[2], at.q_len, dim)


@triton.jit
def keys_of(x, strides, at, head, dim: tl.constexpr):
    """Of a tensor that has a row for each key."""
    return Rows(head_rows(x, strides, at.batch, head, at.k_first), strides[2], at.k_len, dim)


@triton.jit
def _places(rows, first, COUNT: tl.constexpr, DIM: tl.constexpr):
    """Of [COUNT, DIM] numbers from row ``first`` on, and which there are."""
    row, column = tl.arange(0, COUNT), tl.arange(0, DIM)
    places = rows.start + first.to(tl.int64) * rows.stride + (row * rows.stride)[:, None] + column[None, :]
    return places, (first + row < rows.length)[:, None] & (column < rows.dim)[None, :]


@triton.jit
def load_rows(rows, first, COUNT: tl.constexpr, DIM: tl.constexpr):
    """[COUNT, DIM]: rows from ``first`` on, 0 beyond."""
    places, inside = _places(rows, first, COUNT, DIM)
    return tl.load(places, inside, 0.0)


@triton.jit
def store_rows(rows, first, x, COUNT: tl.constexpr, DIM: tl.constexpr):
    """x [COUNT, DIM] to rows from ``first`` on."""
    places, inside = _places(rows, first, COUNT, DIM)
    tl.store(places, x.to(rows.start.dtype.element_ty), inside)


@triton.jit
def own_rows(tile, rows, at, OWN: tl.constexpr, DIM: tl.constexpr, KEEP: tl.constexpr):
    """This program's, at each step: ``tile``, kept in registers, or loaded again, where those are few."""
    if KEEP:
        return tile
    else:
        tl.debug_barrier()  # which the load is not moved across, out of the loop
        return load_rows(rows, at.first, OWN, DIM)


@triton.jit
def span(first, last, before, after, length, STEP: tl.constexpr):
    """Steps through 0 to length - 1, for rows from ``first`` to ``last`` of which each sees from ``before``
    below to ``after`` above its own number: where they begin; from where to where all is seen; and how many
    steps there are beside those."""
    begin = tl.maximum(first - before, 0) // STEP * STEP
    end = tl.maximum(tl.cdiv(tl.minimum(length, last + after + 1), STEP) * STEP, begin)
    full = tl.minimum(tl.cdiv(tl.maximum(last - before, 0), STEP) * STEP, end)
    full_end = tl.maximum(full, tl.minimum(length, first + after + 1) // STEP * STEP)
    return begin, full, full_end, (full - begin + end - full_end) // STEP


@triton.jit
def shift(a, at):
    """From a query's number to its position among the keys."""
    return a.to_end * (at.k_len - at.q_len)


@triton.jit
def shown(a, at, head, i, j, MASK_BLOCK: tl.constexpr):
    """Whether the block mask shows the step of queries from i on and keys from j on; True without one."""
    if a.block_mask is None:
        return True
    else:
        blocks = head_rows(a.block_mask, a.block_strides, at.batch, head, i // MASK_BLOCK)
        return tl.load(blocks + j // MASK_BLOCK * a.block_strides[3]) != 0


# ---- Scores ----


@triton.jit
def scores(a, at, head, product, i, j, CHECKED: tl.constexpr):
    """Of products of queries i and keys j, which broadcast; -Inf where not seen, for which limits are
    compared only if CHECKED.  And how much of a score's gradient reaches the product."""
    s, factor = product * a.scale, 1.0
    if a.softcap is not None:
        t = 1 - 2 / (tl.exp2(s * (2 / a.softcap)) + 1)  # tanh
        s, factor = t * (a.softcap * LOG2E), 1 - t * t
    position = i + shift(a, at)
    if a.slopes is not None:
        s -= tl.load(a.slopes + head) * LOG2E * tl.abs(j - position).to(tl.float32)
    if a.mask is not None:
        rows = head_rows(a.mask, a.mask_strides, at.batch, head, 0) + i.to(tl.int64) * a.mask_strides[2]
        value = tl.load(rows + j.to(tl.int64) * a.mask_strides[3], (i < at.q_len) & (j < at.k_len), 0)
        if a.mask.dtype.element_ty == tl.uint8:
            s = tl.where(value != 0, s, float("-inf"))
        else:
            s += value.to(tl.float32) * LOG2E
    if CHECKED:
        seen = (j < at.k_len) & (j >= position - a.left) & (j <= position + a.right)
        s = tl.where(seen, s, float("-inf"))
    return s, factor


@triton.jit
def _mix(x):
    """lowbias32: memlm/ops/attention.py, ``dropout_factors``."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_rows(a, at, head, i):
    """What the hashes of queries i begin with; without dropout nothing reads it."""
    if a.dropped is None:
        return i
    else:
        row = _mix(tl.cast(a.seed_low, tl.uint32) + GOLDEN_RATIO)
        row = _mix((row ^ tl.cast(a.seed_high, tl.uint32)) + GOLDEN_RATIO)
        row = _mix((row ^ at.sequence.to(tl.uint32)) + GOLDEN_RATIO)
        row = _mix((row ^ head.to(tl.uint32)) + GOLDEN_RATIO)
        return _mix((row ^ i.to(tl.uint32)) + GOLDEN_RATIO)


@triton.jit
def is_dropped(a, rows, j):
    return _mix(rows + j.to(tl.uint32) * GOLDEN_RATIO) < tl.cast(a.dropped, tl.uint32)


# ---- How kernels are started ----

# Many rows of its own read the other side seldom; few suit few queries, masks of small blocks, large heads.
SPACE = [
    triton.Config({"OWN": own, "STEP": step, "KEEP": keep}, num_warps=warps, num_stages=stages)
    for own, step, keep, warps, stages in (
        (16, 64, True, 4, 3), (32, 16, False, 8, 1), (32, 32, True, 8, 2), (64, 32, True, 4, 2),
        (64, 32, True, 8, 2), (64, 64, True, 4, 2), (128, 64, True, 8, 2),
    )
]  # fmt: skip
# Registers for each number that ``room`` counts, as the compiler takes them: as Target.need.
NEED = {100: 3.3, "gfx942": 6.5}
# The largest heads for which registers suffice where they are few, and rows are loaded again: products without
# matrix instructions, as all of f32 are, take whole rows of operands, those of RDNA 3 take them twice.
FEW = {75: 64, "gfx1100": 128}
FEW_OF_F32 = {"gfx1100": 64}


def pruned(
    space: list, target: Target, room, size: int, options: bool, mask_block: int, dim: int, v_dim: int
) -> list[triton.Config]:
    """The configurations that a target has room for and whose steps lie within blocks of the mask.

    ``room(own, step, stages, dim, v_dim)``: how many numbers, of ``size`` bytes, a program has in shared
    memory, and how many in registers, of 32 bits; ``options`` take some more.
    """
    few = FEW.get(target.arch)
    if size == 4:
        few = FEW_OF_F32.get(target.arch, 128)
    target = replace(target, need=NEED.get(target.arch, 3))
    found = []
    for config in space:
        if target.backend == "hip":  # as many threads; tiles that are loaded ahead would be in registers
            warps = config.num_warps * 32 // target.warp
            config = triton.Config(config.kwargs, num_warps=warps, num_stages=1)
        own, step = config.kwargs["OWN"], config.kwargs["STEP"]
        shared, registers = room(own, step, config.num_stages, dim, v_dim)
        if options:
            registers += 2 * own * step
        whole = not mask_block or mask_block % own == mask_block % step == 0
        suits = few is None or (not config.kwargs["KEEP"] and max(dim, v_dim) <= few)
        threads = config.num_warps * target.warp
        if whole and suits and fits(target, size * shared, registers, threads):
            found.append(config)
    return found


def tuned(kernel, room, space=SPACE):
    """``kernel`` in the configuration that is found fastest."""

    def prune(_, named, **constants):
        sizes = (constants[name] for name in ("MASK_BLOCK", "DIM", "V_DIM"))
        q, options = named["q"], named["about"][2]
        found = pruned(space, target_of(q.device), room, q.element_size(), options, *sizes)
        if not found:
            heads = [named[name].shape[3] for name in ("q", "v")]
            raise UnsupportedError(f"query, value: got {q.dtype}, heads of {heads}, too large for {q.device}")
        return found

    key = ["about", "MASK_BLOCK", "DIM", "V_DIM"]
    return triton.autotune(space, key=key, prune_configs_by={"early_config_prune": prune})(kernel)


def about(a: Rules) -> tuple[int, int, int]:
    """What a configuration is tried for once: numbers of queries and keys, as powers of 2, and whether there
    are options."""
    lengths = (min(4096, triton.next_power_of_2(n)) for n in (a.q_len, a.k_len))
    options = any(x is not None for x in (a.softcap, a.slopes, a.mask, a.block_mask, a.dropped))
    return *lengths, int(options)


def in_best(
    kernel, tuned, config: triton.Config | None, a: Rules, batch: int, heads: int, length: int, *args,
    **constants,
) -> None:  # fmt: skip
    """Runs ``kernel`` for all rows in ``config``, or as ``tuned`` in the one that is found fastest."""

    def grid(meta):
        return (tiles(a, length, meta["OWN"]) * heads * batch,)

    if not batch * length:
        return
    if config is None:
        tuned[grid](*args, **constants)
    else:
        settings = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
        kernel[grid](*args, **constants, **settings)
