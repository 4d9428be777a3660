"""Bytes that the CUDA kernels move on the emulated GPU, against the least that their operations can do with, and the
time that memory and tensor cores of real ones leave on paper: a table of docs/gpu.md, which
``python -m tests.gpu_code_table`` writes.  The emulator runs a part of each case, on as many fewer multiprocessors
than an A100's: bytes grow with the part as they do there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from memlm import sparse_formats
from memlm.kv_formats import TYPES

from . import cuda_attention, cuda_kv, emulator, gpu_calls, gpu_limits
from .matmul_checks import random_case
from .paged import paged
from .test_cuda_w8a8_matmul import run as w8a8_matmul

F16 = torch.float16
N = K = 4096
ROWS = ((1, "decode"), (512, "prefill"))
HEADS, KV_HEADS, HEAD = 32, 8, 128
TOKENS = 1024  # of attention
SEQUENCES, CACHED = 16, 4096  # of paged attention
COUNTED_N, COUNTED_ROWS = 512, 64  # more rows are blocks of 64, each of which reads W again, from L2
COUNTED_KV_HEADS, COUNTED_SEQUENCES = 1, 4
SECTOR = 32


@dataclass(frozen=True)
class Case:
    """``run`` does a ``share`` of the operation, which has to touch ``part`` bytes, each input and result once.
    The whole has to touch ``bytes`` and to add ``products``, of int8 where that is said."""

    operation: str
    size: str
    run: Callable
    share: float
    part: int
    bytes: int
    products: int
    int8: bool = False

    def counted(self) -> tuple[int, int]:
        """Bytes that are touched at all, and those that move between chip and L2."""
        machine, (processors, shared) = emulator.emulator(), emulator.DEVICES[800]
        machine.lib.emulator_device(800, max(1, int(processors * self.share)), shared)
        try:
            counts = machine.counts(self.run)
        finally:
            machine.lib.emulator_device(800, processors, shared)
        touched = counts.distinct_read + counts.distinct_written
        return SECTOR * touched, SECTOR * (counts.read_sectors + counts.write_sectors)


def matmuls() -> Iterator[Case]:
    dense = [(op, name) for op, names in gpu_calls.WEIGHT_ONLY.items() for name in names]
    for op, name in [*dense, ("w8a8_matmul", "int8-row")]:
        yield from matmul(op, name, gpu_calls.packed(name, COUNTED_N, K), 1.0)
    for op, name in [("w4_sparse_matmul", "2:4/int4-g32"), ("block_sparse_matmul", "block/int4-g32")]:
        w = random_case(name, COUNTED_N, K, 1, torch.float32)[1]
        density = sparse_formats.density(w)
        yield from matmul(op, f"{name}, {density:.0%} kept", w, density)


def matmul(op: str, name: str, w, density: float) -> Iterator[Case]:
    def bytes_of(m: int, n: int) -> int:
        x = m * (K + 4) if op == "w8a8_matmul" else m * K * 2  # codes, and one scale for each row
        return w.nbytes * n // COUNTED_N + x + m * n * 2

    for m, kind in ROWS:
        rows = min(m, COUNTED_ROWS)
        x = torch.zeros(rows, K, dtype=F16)
        if op == "w8a8_matmul":
            run = partial(w8a8_matmul, x.char(), torch.ones(rows, 1), w, None, 0, dtype=F16)
        else:
            run = partial(emulator.matmul, op, x, w, None)
        yield Case(
            f"{op} {name}", f"{kind}, n = k = {N}, m = {m}", run, COUNTED_N * rows / (N * m),
            bytes_of(rows, COUNTED_N), bytes_of(m, N), int(m * N * K * density), op == "w8a8_matmul",
        )  # fmt: skip


def attention() -> Iterator[Case]:
    share = COUNTED_KV_HEADS / KV_HEADS
    heads = int(HEADS * share)
    q, grad = (torch.zeros(1, heads, TOKENS, HEAD, dtype=F16) for _ in range(2))
    k, v = (torch.zeros(1, COUNTED_KV_HEADS, TOKENS, HEAD, dtype=F16) for _ in range(2))
    sums = heads * TOKENS * 4  # lse, of each query
    forward = 2 * q.nbytes + 2 * k.nbytes + sums
    product = int(HEADS * TOKENS * (TOKENS + 1) // 2 * HEAD)
    size = f"causal, {TOKENS:,} tokens, {HEADS}/{KV_HEADS} heads of {HEAD}"
    yield Case(
        "attention", size, partial(cuda_attention.forward, q, k, v, right=0), share, forward,
        int(forward / share), 2 * product,
    )  # fmt: skip
    made = cuda_attention.forward(q, k, v, right=0)
    backward = 4 * q.nbytes + 4 * k.nbytes + sums  # q, out and two gradients; k, v and theirs
    yield Case(
        "attention_backward", size, partial(cuda_attention.gradients, grad, q, k, v, made), share, backward,
        int(backward / share), 5 * product,
    )  # fmt: skip


def paged_attention() -> Iterator[Case]:
    share = COUNTED_SEQUENCES * COUNTED_KV_HEADS / (SEQUENCES * KV_HEADS)
    for type in TYPES:
        made = paged(type, HEAD, [CACHED] * COUNTED_SEQUENCES, COUNTED_KV_HEADS, dtype=F16)
        q = torch.zeros(COUNTED_SEQUENCES, HEADS * COUNTED_KV_HEADS // KV_HEADS, HEAD, dtype=F16)
        blocks = COUNTED_SEQUENCES * CACHED // made.format.tokens * COUNTED_KV_HEADS
        part = blocks * made.format.block_bytes + 2 * q.nbytes
        if made.format.tail:  # instead of the last block
            more = made.format.tail.block_bytes - made.format.block_bytes
            part += COUNTED_SEQUENCES * COUNTED_KV_HEADS * more
        step = made.step([1] * COUNTED_SEQUENCES)
        given = (q, made.pool, made.tails, *step, HEAD**-0.5, 0, 0.0, None, None)
        yield Case(
            f"paged_attention {type}", f"{SEQUENCES} x {CACHED:,} tokens, {HEADS}/{KV_HEADS} heads of {HEAD}",
            partial(cuda_kv.paged_attention, *given), share, part, int(part / share),
            2 * SEQUENCES * CACHED * HEADS * HEAD,
        )  # fmt: skip


def lines() -> Iterator[list[str]]:
    """The head of the table, and a line for each case."""
    yield [
        "operation", "size", "touched beyond the least", "moved beyond the least", "MB, the least",
        *(f"{device.name}, µs" for device in gpu_limits.DEVICES),
    ]  # fmt: skip
    for cases in (matmuls, attention, paged_attention):
        for case in cases():
            touched, moved = case.counted()
            # What blocks read again grows with their number.
            surplus = touched / case.part, moved / case.share / case.bytes
            beyond = [f"{100 * ratio - 100:+.1f} %" for ratio in surplus]
            seconds = (d.seconds(case.bytes, case.products, case.int8) for d in gpu_limits.DEVICES)
            times = [f"{1e6 * s:.1f}" for s in seconds]
            yield [case.operation, case.size, *beyond, f"{case.bytes / 1e6:.2f}", *times]
