"""y = x W^T over packed weights: the kernel of w2_matmul, w4_matmul and w8_matmul.

A program computes BLOCK_M rows of x by BLOCK_N features.  It reads codes as 32-bit words, of which a
feature has one for every 32 / BITS consecutive k (memlm/formats.py): 16 features stand side by side,
64 bytes.  Field j of a word is at bit 8 (j % 4) + BITS (j // 4).

Codes go into the product as integers, exactly: a 16-bit float whose mantissa holds the code, minus what
stands above it (1024 in f16, 128 in bf16).  The f32 sums over STEP k, all of one group, are multiplied by
the scale and added up in f32; an offset is multiplied by the sum of x.  Levels of NF4 are rounded to x's
dtype.

Where there are few programs, SPLITS of them share out k, and a second kernel adds their sums in order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from memlm.formats import NF4_LEVELS, ZEROS, Packed
from memlm.kernels import UnsupportedError
from memlm.kernels._rows import rms_norm
from memlm.kernels._targets import TARGETS, Target, fits
from memlm.ops import _matmul


@triton.jit
def _fields(words, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes [ROWS, COLUMNS] of words [ROWS, COLUMNS BITS / 32]."""
    field = tl.arange(0, 32 // BITS)
    shift = 8 * (field % 4) + BITS * (field // 4)
    return tl.reshape((words[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1), [ROWS, COLUMNS])


@triton.jit
def _unpack(q, levels, DTYPE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr):
    """Codes as numbers of DTYPE: f16, bf16, or f32."""
    if LEVELS:
        w = tl.load(levels + q).to(DTYPE)
    elif BITS == 8:
        if DTYPE == tl.float16:
            w = ((q ^ 0x80) | 0x6400).to(tl.int16).to(DTYPE, bitcast=True) - 1152
        else:
            w = ((q ^ 0x80) - 128).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.float16:
        w = (q | 0x6400).to(tl.int16).to(DTYPE, bitcast=True) - (1024 + ZERO)
    elif DTYPE == tl.bfloat16:
        w = (q | 0x4300).to(tl.int16).to(DTYPE, bitcast=True) - (128 + ZERO)
    else:
        w = (q - ZERO).to(DTYPE)
    return w


@triton.jit
def _add_product(sums, x_tile, w, scales, offsets, place, inside, OFFSETS: tl.constexpr):
    """sums + x_tile w, whose columns have the scales and offsets at ``place``."""
    scale = tl.load(scales + place, inside, 0.0).to(tl.float32)
    sums += tl.dot(x_tile, w) * scale[None, :]
    if OFFSETS:
        offset = tl.load(offsets + place, inside, 0.0).to(tl.float32)
        sums += tl.sum(x_tile.to(tl.float32), 1)[:, None] * offset[None, :]
    return sums


@triton.jit
def _add_step(
    sums, x_tile, column, step, words, scales, offsets, levels, n, blocks, groups, group_steps,
    BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """sums + x_tile W[column, STEP k]^T"""
    FIELDS: tl.constexpr = 32 // BITS
    tile, row = (column // 16).to(tl.int64), column % 16
    block = step * (STEP // FIELDS) + tl.arange(0, STEP // FIELDS)
    inside = (column < n)[:, None] & (block < blocks)[None, :]
    word = tl.load(words + ((tile * blocks)[:, None] + block[None, :]) * 16 + row[:, None], inside, 0)
    w = _unpack(_fields(word, BITS, BLOCK_N, STEP), levels, x_tile.dtype, BITS, ZERO, LEVELS)
    place = (tile * groups + step // group_steps) * 16 + row
    return _add_product(sums, x_tile, tl.trans(w), scales, offsets, place, column < n, OFFSETS)


@triton.jit
def _finish(sums, up, at, column, bias, residual, y, m, n, BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """The steps behind the product; rows of y and residual are dense."""
    columns = n // 2 if SWIGLU else n
    if BIAS:
        sums += tl.load(bias + column, column < n, 0.0).to(tl.float32)[None, :]
    if SWIGLU:
        if BIAS:
            other = column + n // 2
            up += tl.load(bias + other, other < n, 0.0).to(tl.float32)[None, :]
        sums = sums / (1 + tl.exp(-sums)) * up
    place = at[:, None].to(tl.int64) * columns + column[None, :]
    inside = (at < m)[:, None] & (column < columns)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + place, inside, 0.0).to(tl.float32)
    tl.store(y + place, sums.to(y.dtype.element_ty), inside)


@triton.jit
def _store_share(sums, up, split, at, column, partial, m, n, SWIGLU: tl.constexpr):
    """The sums of one of SPLITS programs, for add_splits_kernel."""
    place = (split * m + at)[:, None].to(tl.int64) * n + column[None, :]
    inside = (at < m)[:, None] & (column < (n // 2 if SWIGLU else n))[None, :]
    tl.store(partial + place, sums, inside)
    if SWIGLU:
        tl.store(partial + place + n // 2, up, inside)


@triton.jit
def weight_only_kernel(
    x, words, scales, offsets, levels, bias, residual, y, partial,
    m, n, k, x_stride, blocks, groups, group_steps, steps, rows_about,
    BITS: tl.constexpr, ZERO: tl.constexpr, LEVELS: tl.constexpr, OFFSETS: tl.constexpr,
    BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # the grid's one dimension without limit
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    share = tl.cdiv(steps, SPLITS)
    x_row = x + at[:, None].to(tl.int64) * x_stride
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        in_k = step * STEP + tl.arange(0, STEP)
        x_tile = tl.load(x_row + in_k[None, :], (at < m)[:, None] & (in_k < k)[None, :], 0.0)
        sums = _add_step(sums, x_tile, column, step, words, scales, offsets, levels, n, blocks, groups,
                         group_steps, BITS, ZERO, LEVELS, OFFSETS, BLOCK_N, STEP)  # fmt: skip
        if SWIGLU:
            up = _add_step(up, x_tile, column + n // 2, step, words, scales, offsets, levels, n, blocks,
                           groups, group_steps, BITS, ZERO, LEVELS, OFFSETS, BLOCK_N, STEP)  # fmt: skip
    if SPLITS == 1:
        _finish(sums, up, at, column, bias, residual, y, m, n, BIAS, SWIGLU, RESIDUAL)
    else:
        _store_share(sums, up, split, at, column, partial, m, n, SWIGLU)


@triton.jit
def add_splits_kernel(
    partial, bias, residual, y, m, n,
    BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (at < m)[:, None] & (column < (n // 2 if SWIGLU else n))[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(SPLITS):
        place = (split * m + at)[:, None].to(tl.int64) * n + column[None, :]
        sums += tl.load(partial + place, inside, 0.0)
        if SWIGLU:
            up += tl.load(partial + place + n // 2, inside, 0.0)
    _finish(sums, up, at, column, bias, residual, y, m, n, BIAS, SWIGLU, RESIDUAL)


# Few rows want many features a program, so that x is read seldom, and many stages, as nothing but the
# codes takes time; many rows want large tiles, which tensor cores need to be fed from shared memory.
SPACE = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "SPLITS": splits}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages, splits in (
        (16, 32, 2, 5, 1), (16, 64, 4, 4, 1), (16, 128, 4, 4, 1),
        (16, 64, 4, 4, 4), (16, 64, 4, 4, 8), (32, 64, 4, 4, 1), (32, 64, 4, 4, 4),
        (64, 64, 4, 3, 1), (64, 128, 4, 3, 1), (128, 128, 8, 3, 1),
    )
]  # fmt: skip
MOST_SPLITS = max(config.kwargs["SPLITS"] for config in SPACE)
SPLIT_ROWS = 32  # beyond them there are programs enough, and sums would be a lot to store


@functools.cache
def levels_on(device: torch.device) -> torch.Tensor:
    """NF4_LEVELS, f32, copied there once: a captured graph may not copy from the host."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def about(m: int) -> int:
    """The number of rows that a configuration is tried for once: a power of 2."""
    return min(256, triton.next_power_of_2(m))


def pruned(
    target: Target, m: int, step: int, bits: int, swiglu: bool, space: Iterable[triton.Config] = SPACE
) -> list[triton.Config]:
    """The configurations that a target has room for and that waste no more than half of their rows."""
    found = []
    for config in space:
        if config.num_stages > target.stages:
            config = triton.Config(config.kwargs, num_warps=config.num_warps, num_stages=target.stages)
        rows, columns = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
        wide = columns * (2 if swiglu else 1)
        shared = config.num_stages * (rows * step * 2 + wide * step * bits // 8)
        room = fits(target, shared, 2 * rows * wide, config.num_warps * target.warp)
        splits = config.kwargs["SPLITS"] == 1 or m <= SPLIT_ROWS
        # CDNA multiplies 32 rows by 32 x 32 at a time, whose operands fill its registers; and 256 features of
        # looked-up numbers, which are f32 in its shared memory, fill that.
        suits = (rows == 16 or rows < 2 * m) and not (target.warp == 64 and (rows == 32 or wide == 256))
        if room and splits and suits:
            found.append(config)
    return found


def target_of(device: torch.device) -> Target:
    """The target that a device is, or the nearest below."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return TARGETS.get(name, TARGETS["gfx1100"])
    have = 10 * properties.major + properties.minor
    known = [t for t in TARGETS.values() if t.backend == "cuda" and t.arch <= have]
    if not known:
        raise RuntimeError(
            f"device: {properties.name} has compute capability {properties.major}.{properties.minor}, "
            "accepted are those from 7.5 on"
        )
    return max(known, key=lambda t: t.arch)


def is_turing(device: torch.device) -> bool:
    """Whether it is of sm_75, for which Triton multiplies nothing but f16 and f32."""
    return device.type == "cuda" and target_of(device).arch == 75


def most_step(device: torch.device) -> int:
    """k of one product, if a group has as many."""
    return target_of(device).step if device.type == "cuda" else 64


def _prune(_, named, **constants):
    of = (constants[name] for name in ("STEP", "BITS", "SWIGLU"))
    return pruned(target_of(named["x"].device), named["m"], *of)


# BITS: what fits depends on them, and packed words of all formats are int32.
tuned_kernel = triton.autotune(
    SPACE, key=["rows_about", "n", "k", "BITS", "LEVELS", "OFFSETS", "STEP", "SWIGLU"],
    prune_configs_by={"early_config_prune": _prune},
)(weight_only_kernel)


SUM_TILE = {"BLOCK_M": 16, "BLOCK_N": 64}  # of the kernels that add up splits


def tiles_of_sums(m: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(m, SUM_TILE["BLOCK_M"]), triton.cdiv(columns, SUM_TILE["BLOCK_N"])


def in_best(run, kernel, tuned, config: triton.Config | None, m: int, columns: int):
    """``run(kernel on its grid, most splits, **settings)`` in ``config``, or as ``tuned`` in the one
    that is found fastest.  Returns what it does, and how many splits there were."""

    def grid(meta):
        return triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(columns, meta["BLOCK_N"]), meta["SPLITS"]

    if config is None:
        result = run(tuned[grid], MOST_SPLITS if m <= SPLIT_ROWS else 1)
        return result, tuned.best_config.kwargs["SPLITS"]
    settings = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
    splits = config.kwargs["SPLITS"]
    return run(kernel[grid], splits, **settings), splits


def product(
    x: torch.Tensor, packed, bias, norm, eps: float, swiglu: bool, residual, config: triton.Config | None,
    kernel, tuned, weights: tuple, numbers: tuple, constants: dict, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """The product and the layers around it, as memlm.ops.w4_matmul documents it, by ``kernel``; x is f16
    or bf16, ``packed`` W in any format.

    ``config``: this one instead of the one that is found fastest, with ``tuned``.  Of the arguments of
    ``kernel`` the caller gives ``weights``, tensors or None, between x and bias, ``numbers`` between
    x_stride and rows_about, and ``constants``.  ``dtype`` of the result, by default x's.

    Raises UnsupportedError for an x of another dtype.
    """
    shape = _matmul.check(x, packed, bias, norm, swiglu, residual)
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(f"x: got {x.dtype}, Triton kernels take f16 and bf16")
    n, k = packed.n, packed.k
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(len(rows), shape[-1], dtype=dtype or x.dtype, device=x.device)
    if not len(rows):
        return y.view(shape)
    if norm is not None:
        rows = rms_norm(rows, norm, eps)
    m = len(rows)
    residual = None if residual is None else residual.reshape(y.shape).contiguous()
    flags = {"BIAS": bias is not None, "SWIGLU": swiglu, "RESIDUAL": residual is not None}
    weights, around = ([y if t is None else t for t in some] for some in (weights, (bias, residual)))  # nothing reads y

    def run(chosen, splits: int, **settings):
        """The product with at most so many splits."""
        partial = torch.empty(splits, m, n, dtype=torch.float32, device=x.device) if splits > 1 else y
        chosen(
            rows, *weights, *around, y, partial, m, n, k, rows.stride(0), *numbers, about(m),
            **constants, **flags, **settings,
        )  # fmt: skip
        return partial

    partial, splits = in_best(run, kernel, tuned, config, m, y.shape[1])
    if splits > 1:
        add_splits_kernel[tiles_of_sums(m, y.shape[1])](
            partial, *around, y, m, n, SPLITS=splits, **SUM_TILE, **flags
        )
    return y.view(shape)


def weight_only(
    x: torch.Tensor, packed: Packed, bias, norm, eps: float, swiglu: bool, residual,
    config: triton.Config | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """:func:`product` over a dense W."""
    format = packed.format
    step = 32 if format.group == 32 else most_step(x.device)
    padded = format.padded_k(packed.k)
    levels = levels_on(packed.codes.device) if format.codebook == "nf" else None
    return product(
        x, packed, bias, norm, eps, swiglu, residual, config, weight_only_kernel, tuned_kernel,
        (packed.codes.view(torch.int32), packed.scales, packed.offsets, levels),
        (
            padded * format.bits // 32, format.groups(packed.k), triton.cdiv(format.group or padded, step),
            triton.cdiv(padded, step),
        ),
        {
            "BITS": format.bits, "ZERO": ZEROS[format.bits] if format.symmetric else 0,
            "LEVELS": levels is not None, "OFFSETS": packed.offsets is not None, "STEP": step,
        },
        dtype,
    )  # fmt: skip
