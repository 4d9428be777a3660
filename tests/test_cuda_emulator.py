"""The emulator that runs the CUDA kernels: it finds planted mistakes, and its fragments lie in lanes as
the PTX ISA (8.7, section 9.7.14) says."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from . import device, emulator
from .emulator import KernelError, emulator_of, pointer

pytestmark = pytest.mark.skipif(device.wanted(), reason="needs no GPU")

PLANTED = Path(__file__).parent / "cuda_emulator" / "planted.cu"
THREADS = 64
MISTAKES = [  # as planted.cu numbers them
    "none", "no barrier", "no second barrier", "uninitialised", "no wait", "no barrier after wait",
    "read beyond", "write beyond", "misaligned", "half at barrier", "half a warp shuffles",
    "shared beyond", "write to input", "global race", "leaves", "no warp barrier", "early overwrite",
    "two barriers",
]  # fmt: skip
FOUND = {
    "no barrier": "race: read of what another thread wrote|uninitialised",
    "no second barrier": "race: write over what another thread read|race: read of what another thread wrote",
    "uninitialised": "read of uninitialised shared memory",
    "no wait": "read of what cp.async has not brought yet",
    "no barrier after wait": "race: read of what another thread wrote|uninitialised|not brought yet",
    "read beyond": "read out of bounds",
    "write beyond": "write out of bounds",
    "misaligned": "misaligned access",
    "half at barrier": "divergent: a thread waits at",
    "half a warp shuffles": "divergent: a thread",
    "shared beyond": "outside of the block's shared memory",
    "write to input": "write to an array that is only read",
    "global race": "race: write over what another thread wrote",
    "leaves": "divergent: a thread has left while another waits at __syncthreads",
    "no warp barrier": "race: ",
    "early overwrite": "write to where cp.async is to write|race: write over",
    "two barriers": "divergent: a thread waits at __syncthreads while another waits at __syncthreads",
}


def run_planted(mistake: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, out = torch.randn(THREADS), torch.full((THREADS,), float("nan"))
    machine = emulator_of(PLANTED)
    machine.seed = seed
    machine.call(
        "run_planted", MISTAKES.index(mistake), ctypes.c_void_p(pointer(values)),
        ctypes.c_void_p(pointer(out)), read=[values], written=[out],
    )  # fmt: skip
    return values, out


@pytest.mark.parametrize("seed", range(5))
def test_correct_kernel(seed):
    values, out = run_planted("none", seed)
    assert torch.equal(out, values.flip(0) + values)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mistake", FOUND)
def test_finds(mistake, seed):
    """Whatever the order in which it runs the threads."""
    with pytest.raises(KernelError, match=FOUND[mistake]) as error:
        run_planted(mistake, seed)
    if "divergent" not in FOUND[mistake]:
        assert "planted.cu:" in str(error.value)


def test_counts():
    values, out = torch.randn(THREADS), torch.empty(THREADS)
    machine = emulator_of(PLANTED)
    counts = machine.counts(
        lambda: machine.call(
            "run_planted", 0, ctypes.c_void_p(pointer(values)), ctypes.c_void_p(pointer(out)),
            read=[values], written=[out],
        )  # fmt: skip
    )
    sectors = {t.data_ptr() // 32 for t in (values, values[-1:])} | set(
        range(values.data_ptr() // 32, (values.data_ptr() + 255) // 32 + 1)
    )
    assert counts.distinct_read == len(sectors)
    assert counts.blocks == 2 and counts.barriers == 2 * 3
    # Four accesses to shared memory by two warps in two blocks, a float each: no conflicts.
    assert counts.shared_requests == counts.shared_passes == 4 * 2 * 2


# Element i of a lane's fragment -> row and column at lane 0; a lane adds lane / 4 to one of them, and
# lane % 4 times as many as lie side by side to the other.  PTX ISA 8.7: 9.7.14.5.8 (m16n8k16, 16 bits),
# 9.7.14.5.10 (m16n8k32, 8 bits).
A16 = [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)]
B16 = [(0, 0), (1, 0), (8, 0), (9, 0)]
D = [(0, 0), (0, 1), (8, 0), (8, 1)]
A8 = [(0, 0), (0, 1), (0, 2), (0, 3), (8, 0), (8, 1), (8, 2), (8, 3),
      (0, 16), (0, 17), (0, 18), (0, 19), (8, 16), (8, 17), (8, 18), (8, 19)]  # fmt: skip
B8 = [(0, 0), (1, 0), (2, 0), (3, 0), (16, 0), (17, 0), (18, 0), (19, 0)]


def fragments(matrix: torch.Tensor, table, side: int, of_columns: bool) -> torch.Tensor:
    """``[32, len(table)]``: what each lane holds; ``of_columns``: lane / 4 goes along them, as in B."""
    out = matrix.new_empty(32, len(table))
    for lane in range(32):
        g, c = lane // 4, lane % 4 * side
        for i, (row, column) in enumerate(table):
            out[lane, i] = matrix[row + c, column + g] if of_columns else matrix[row + g, column + c]
    return out


def unfold(d: torch.Tensor) -> torch.Tensor:
    """[32, 4] -> [16, 8]"""
    out = d.new_empty(16, 8)
    for lane in range(32):
        for i, (row, column) in enumerate(D):
            out[row + lane // 4, column + lane % 4 * 2] = d[lane, i]
    return out


@pytest.mark.parametrize("name, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma(name, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    c = torch.randint(-8, 9, (32, 4), generator=generator).float()
    a_lanes, b_lanes, d = fragments(a, A16, 2, False), fragments(b, B16, 2, True), c.clone()
    arguments = [ctypes.c_void_p(pointer(t)) for t in (a_lanes, b_lanes, d)]
    emulator_of(PLANTED).call(f"run_mma_{name}", *arguments, read=[a_lanes, b_lanes], written=[d])
    assert torch.equal(unfold(d), a.float() @ b.float() + unfold(c))


def test_mma_int8():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (16, 32), generator=generator).to(torch.int8)
    b = torch.randint(-128, 128, (32, 8), generator=generator).to(torch.int8)
    a_lanes, b_lanes = fragments(a, A8, 4, False), fragments(b, B8, 4, True)
    d = torch.ones(32, 4, dtype=torch.int32)
    arguments = [ctypes.c_void_p(pointer(t)) for t in (a_lanes, b_lanes, d)]
    emulator_of(PLANTED).call("run_mma_int8", *arguments, read=[a_lanes, b_lanes], written=[d])
    assert torch.equal(unfold(d), a.int() @ b.int() + 1)


# Bits 0 to 15 and 16 to 31 of a lane's metadata, at the lanes with lane % 4 = 0 and 1 (or, by the selector,
# 2 and 3): row and column of the 16 elements they are of; lane / 4 adds to the row.  PTX ISA 8.7:
# 9.7.14.6.2.2 (sparse m16n8k32, 16 bits).
METADATA = [[(0, 0), (8, 0)], [(0, 16), (8, 16)]]


@pytest.mark.parametrize("selector, dtype", [(0, torch.float16), (1, torch.bfloat16)])
def test_mma_sparse(selector, dtype):
    """A row's stored elements lie as those of a dense m16n8k16, each two in the order of their places."""
    generator = torch.Generator().manual_seed(0)
    at = torch.rand(16, 8, 4, generator=generator).argsort(2)[..., :2].sort(2).values
    stored = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    a = torch.zeros(16, 8, 4).scatter_(2, at, stored.float().view(16, 8, 2)).view(16, 32)
    b = torch.randint(-8, 9, (32, 8), generator=generator).to(dtype)
    nibbles = (at[..., 0] | at[..., 1] << 2).numpy().astype(np.uint32)  # of each 4 columns
    places = np.full(32, 0xDEADBEEF, np.uint32)  # which others must not look at
    for lane in range(32):
        pair = lane % 4 - 2 * selector
        if pair not in (0, 1):
            continue
        places[lane] = 0
        for half, (row, column) in enumerate(METADATA[pair]):
            for i in range(4):
                places[lane] |= nibbles[row + lane // 4, column // 4 + i] << np.uint32(16 * half + 4 * i)
    given = torch.from_numpy(places.view(np.int32))
    b_table = B16 + [(row + 16, column) for row, column in B16]
    lanes, d = (fragments(stored, A16, 2, False), fragments(b, b_table, 2, True)), torch.zeros(32, 4)
    arguments = [ctypes.c_void_p(pointer(t)) for t in (*lanes, given, d)]
    emulator_of(PLANTED).call("run_mma_sparse", selector, *arguments, read=[*lanes, given], written=[d])
    assert torch.equal(unfold(d), a @ b.float())


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(transposed):
    """Matrix i: its rows are 8 i to 8 i + 7; a lane receives two elements of each, as 9.7.14.5.15 draws."""
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    given = torch.from_numpy(matrices.astype(np.int16).reshape(-1))
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    emulator_of(PLANTED).call(
        "run_load_matrices", int(transposed), ctypes.c_void_p(pointer(given)),
        ctypes.c_void_p(pointer(out)), read=[given], written=[out],
    )  # fmt: skip
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for i in range(4):
            matrix = matrices[i].T if transposed else matrices[i]
            assert out[lane, i].tolist() == matrix[row, column : column + 2].tolist()


def test_too_large_a_launch():
    """What the device does not have is refused as the driver would."""
    machine = emulator_of(PLANTED)
    machine.lib.emulator_device(800, 108, 128)
    try:
        with pytest.raises(KernelError, match="that the device does not have"):
            run_planted("none", 0)
    finally:
        machine.lib.emulator_device(800, *emulator.DEVICES[800])
