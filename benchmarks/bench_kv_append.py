"""``kv_append`` against copies to plain tensors: ``python -m benchmarks.bench_kv_append --help``.

W stands for the keys of n new tokens, k / 64 heads of size 64, and for their values; the bytes counted
are those read, of both, and those written."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run as a script

from benchmarks import harness
from memlm import kv_formats, ops
from memlm.kv_formats import KvFormat

BLOCK, DIM = 64, 64
# Of random numbers, relative to their norm.
ERROR = {"f32": 1e-6, "bf16": 0.01, "int8": 0.02, "int4": 0.2}
KV_APPEND = harness.Operation(
    "kv_append",
    x=lambda case: torch.empty(0),
    exact=lambda _, w: w.double(),
    macs=lambda case: 2 * case.n * case.k,
    share=lambda case: 1.0,
)


def paged(type: str) -> harness.Candidate:
    format = KvFormat(type, BLOCK, DIM)

    def prepare(w):
        count, heads, blocks = len(w), w.shape[1] // DIM, -(-len(w) // BLOCK)
        pool = torch.empty(heads, blocks, format.block_bytes, dtype=torch.uint8)
        tails = tail_of = None
        if format.tail:
            tails = torch.empty(heads, 1, format.tail.block_bytes, dtype=torch.uint8)
            tail_of = torch.zeros(1, dtype=torch.int32)
        keys = w.view(count, heads, DIM)
        table = torch.arange(blocks, dtype=torch.int32)[None]
        ends = torch.tensor([0, count]), torch.tensor([count])
        arguments = pool, tails, keys, keys, *ends, table, tail_of, format.index, BLOCK
        return harness.Sized(arguments, 2 * w.nbytes + pool.nbytes * count // (blocks * BLOCK))

    def run(_, stored):
        ops.kv_append(*stored.value)
        return stored.value

    def value(arguments):
        pool, _, k, *_ = arguments
        keys, _ = kv_formats.read(format, pool)  # [heads, blocks, tokens, dim]
        return keys.flatten(1, 2)[:, : len(k)].transpose(0, 1).flatten(1)

    return harness.Candidate("memlm", type, "f32", ERROR[type], prepare, run, value=value)


def copied(type: str) -> harness.Candidate:
    """To a tensor each, ``[heads, tokens, dim]``, as other caches have them."""
    dtype = kv_formats.FLOATS[type]

    def prepare(w):
        keys = w.view(len(w), -1, DIM).transpose(0, 1)
        stores = [torch.empty(keys.shape, dtype=dtype) for _ in range(2)]
        return harness.Sized((keys, *stores), 2 * w.nbytes + 2 * stores[0].nbytes)

    def run(_, stored):
        keys, *stores = stored.value
        for store in stores:
            store.copy_(keys)
        return stores[0]

    return harness.Candidate(
        f"torch_{type}", type, "f32", ERROR[type], prepare, run,
        value=lambda store: store.transpose(0, 1).flatten(1),
    )  # fmt: skip


CANDIDATES = [*map(paged, kv_formats.TYPES), *map(copied, kv_formats.FLOATS)]


@pytest.mark.parametrize(**harness.pytest_cases(CANDIDATES, [(512, 192)], [1]))
def test_kv_append(benchmark, case, candidate):
    harness.run_benchmark(benchmark, KV_APPEND, case, candidate)


if __name__ == "__main__":
    harness.main(KV_APPEND, CANDIDATES, "1x192,512x192,512x1024", "1", "torch_bf16")
