"""What products of 16 tokens move, counted by the emulator: each byte of W, x and y once from and to memory,
nothing but x again from the cache, and no conflicts among banks of shared memory."""

import pytest
import torch

from memlm.formats import Packed

from . import device, emulator, gpu_traffic
from .matmul_checks import random_case
from .test_cuda_quantize_rows import quantize_rows
from .test_cuda_w8a8_matmul import run

pytestmark = pytest.mark.skipif(device.wanted(), reason="only the emulator counts")

SECTOR = 32
M = 16
BLOCK_ROWS = 64  # of W, for so many tokens


def sectors(*tensors: torch.Tensor) -> int:
    return sum(-(-t.nbytes // SECTOR) for t in tensors)


def counts_of(op: str, packed: Packed, x: torch.Tensor) -> tuple[emulator.Counts, list[torch.Tensor]]:
    """Of a product with f16 result; and what it reads of x."""
    machine = emulator.emulator()
    if op == "w8a8_matmul":
        codes, scales = quantize_rows(x)
        return machine.counts(lambda: run(codes, scales, packed, None, 0, dtype=torch.float16)), [codes, scales]
    return machine.counts(lambda: emulator.matmul(op, x, packed, None)), [x]


CASES = [("w4_matmul", "int4-g64"), ("w4_matmul", "int4a-g32"), ("w4_matmul", "nf4-g64"), ("w8a8_matmul", "int8-row")]


@pytest.mark.parametrize("op, format", CASES)
def test_the_least_there_is(op, format):
    n, k = 512, 1024
    x, packed, _ = random_case(format, n, k, M, torch.float16)
    counts, of_x = counts_of(op, packed, x)
    weights, least = sectors(*packed.tensors().values()), sectors(*packed.tensors().values(), *of_x)
    y = M * n * 2 // SECTOR
    # An array may begin inside of a sector.
    assert 0 <= counts.distinct_read - least <= 4
    assert counts.distinct_read + counts.distinct_written <= 1.03 * (least + y)
    # Weights come once; x once for each block that needs it, of which there are n / 64.
    blocks = n // BLOCK_ROWS
    assert counts.blocks == blocks
    assert counts.read_sectors <= 1.03 * (weights + blocks * sectors(*of_x))
    assert counts.write_sectors == counts.distinct_written == y
    assert counts.shared_requests > 0 and counts.shared_passes == counts.shared_least


def test_sums_of_blocks_that_share_out_k():
    """Where few rows would leave processors without work, each of the blocks that share them adds 4 bytes
    for each of their sums, which stay in the cache, written and read once."""
    n, k = 128, 4096
    x, packed, _ = random_case("int4-g64", n, k, M, torch.float16)
    counts, of_x = counts_of("w4_matmul", packed, x)
    splits = counts.blocks // (n // BLOCK_ROWS)
    assert splits == 4  # as long as a slice of each has 4 stages of 64 k
    partial = splits * n * M * 4 // SECTOR  # and atomic counters, which are not counted
    least = sectors(*packed.tensors().values(), *of_x)
    assert counts.distinct_read == least + partial
    assert counts.distinct_written == M * n * 2 // SECTOR + partial
    assert counts.shared_passes == counts.shared_least


@pytest.mark.gpu_proof
@pytest.mark.parametrize("cases", [gpu_traffic.matmuls, gpu_traffic.attention, gpu_traffic.paged_attention])
def test_within_three_percent(cases):
    """Of the operations in docs/gpu.md, all but the sums of those that share out k or tokens."""
    for case in cases():
        touched, moved = case.counted()
        shares_out = case.operation.startswith(("block_sparse", "paged"))
        # An array may begin inside of a sector.
        assert case.part - 8 * SECTOR <= touched <= (1.2 if shares_out else 1.03) * case.part, case.operation
        assert touched <= moved
