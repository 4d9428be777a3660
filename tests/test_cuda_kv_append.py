"""kv_append on the emulated GPU, csrc/cuda/kv_append.cu: what is stored, to the last bit, is what the
reference stores."""

import pytest
import torch

from memlm.kv_formats import TYPES
from memlm.ops._registry import implementations

from . import cuda_kv
from .emulator import emulator
from .paged import Paged, check_extremes, paged
from .test_kv_append import DIMS, LENGTHS

types = pytest.mark.parametrize("type", TYPES)
DTYPES = (torch.bfloat16, torch.float16)


def emptied(made: Paged):
    """A pool and tails of nothing, as tests/paged.py makes them."""
    return torch.full_like(made.pool, 255), None if made.tails is None else torch.full_like(made.tails, 255)


def all_tokens(made: Paged):
    return torch.cat(made.k), torch.cat(made.v)


def assert_same(pool, tails, made: Paged):
    assert torch.equal(pool, made.pool)  # what belongs to no token is still 255
    if tails is not None:
        assert torch.equal(tails, made.tails)


def check(type, dim, turn, arch=800):
    dtype = torch.float16 if arch < 800 else DTYPES[turn % 2]
    made = paged(type, dim, LENGTHS, 1 + turn % 3, (32, 64, 96)[turn % 3], dtype, implementation="reference")
    pool, tails = emptied(made)
    cuda_kv.kv_append(pool, tails, *all_tokens(made), *made.step(LENGTHS), arch=arch, spare=turn)
    assert_same(pool, tails, made)


@types
def test_equals_the_specification(type):
    for turn, dim in enumerate((33, 128)):
        check(type, dim, turn)


@types
@pytest.mark.gpu_proof
def test_equals_the_specification_everywhere(type):
    for turn, dim in enumerate([*DIMS, 512]):
        check(type, dim, turn)
        check(type, dim, turn, arch=750)


@types
def test_turing(type):
    check(type, 80, 1, arch=750)


@types
def test_independent_of_chunks(type):
    whole = paged(type, 80, [40, 73], kv_heads=1, dtype=torch.float16, implementation="reference")
    for chunk in (1, 7):
        pool, tails = emptied(whole)
        for start in range(0, 73, chunk):
            ends = [min(n, start + chunk) for n in whole.lengths]
            starts = [min(n, start) for n in whole.lengths]
            k, v = (
                torch.cat([x[begin:end] for x, begin, end in zip(both, starts, ends)])
                for both in (whole.k, whole.v)
            )
            rows = torch.tensor([0, *(end - begin for end, begin in zip(ends, starts))]).cumsum(0)
            cuda_kv.kv_append(pool, tails, k, v, rows, torch.tensor(ends), *whole.step([])[2:])
        assert_same(pool, tails, whole)


def test_many_sequences():
    """More than one look at 32 of them finds."""
    lengths = [1 + i * 7 % 5 if i % 3 else 0 for i in range(70)]
    made = paged("int8", 32, lengths, 1, 32, torch.float16, implementation="reference")
    pool, _ = emptied(made)
    cuda_kv.kv_append(pool, None, *all_tokens(made), *made.step(lengths))
    assert_same(pool, None, made)


def test_rows_that_lie_apart():
    made = paged("int4", 64, [50], dtype=torch.float16)
    qkv = torch.randn(50, 8, 64).half()
    k, v = qkv[:, 4:6], qkv[:, 6:]
    pools = []
    for k_, v_ in ((k, v), (k.contiguous(), v.contiguous())):
        pools.append(made.pool.clone())
        cuda_kv.kv_append(pools[-1], made.tails, k_, v_, *made.step([50]))
    assert torch.equal(*pools)


@pytest.mark.parametrize("type", ["int8", "int4"])
def test_extremes(type):
    check_extremes(cuda_kv.kv_append, type, torch.bfloat16)


@types
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(type, dtype):
    """q is turned in place; of k what is stored is what the reference stores of turned keys."""
    lengths, new, dim = [20, 0, 35], [3, 0, 18], 64
    made = paged(type, dim, lengths, 2, dtype=dtype, implementation="reference")
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(21, heads, dim, generator=generator).to(dtype) for heads in (6, 2, 2))
    positions = torch.tensor([17, 18, 19, *range(17, 35)])
    angles = torch.arange(40.0)[:, None] * 100.0 ** -(torch.arange(32) / 32)
    for at in (positions, None):
        pool, tails = made.pool.clone(), None if made.tails is None else made.tails.clone()
        turned = q.clone()
        rope = {"cos": angles.cos(), "sin": angles.sin(), "q": turned, "positions": at}
        cuda_kv.kv_append(pool, tails, k, v, *made.step(new), rope=rope)
        rows = torch.arange(21) if at is None else at
        cos, sin = (rope[name][rows][:, None].double() for name in ("cos", "sin"))

        def by_definition(x):
            a, b = x.double().chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        # Two products and a sum in f32, then one rounding: at most the next number of the dtype.
        unit = torch.finfo(dtype).eps
        expected = by_definition(q)
        bound = (unit / 2 * expected.abs() + 2**-22 * q.abs().amax()).clamp(min=2**-24)
        assert ((turned.double() - expected).abs() <= bound).all()
        # As if another operation had turned the keys: its result is what the kernel makes of them as queries.
        keys = k.clone()
        cuda_kv.kv_append(pool, tails, k, v, *made.step(new), rope=rope | {"q": keys})
        wanted = made.pool.clone(), None if made.tails is None else made.tails.clone()
        implementations("kv_append")["reference"](*wanted, keys, v, *made.step(new))
        assert torch.equal(pool, wanted[0]) and (tails is None or torch.equal(tails, wanted[1]))


def test_traffic():
    """Decoding: what is read and written are the sectors that hold the new tokens."""
    lengths = [100] * 4
    for type, dim in (("bf16", 128), ("int8", 128), ("int4", 128)):
        made = paged(type, dim, lengths, 2, dtype=torch.float16)
        k, v = (torch.stack([x[-1] for x in both]) for both in (made.k, made.v))
        counts = emulator().counts(
            lambda: cuda_kv.kv_append(made.pool, made.tails, k, v, *made.step([1] * 4))
        )
        assert counts.write_sectors <= 1.05 * counts.distinct_written


def test_no_tokens():
    for lengths, new in (([], []), ([5, 70], [0, 0])):
        made = paged("int4", 64, lengths)
        before = made.pool.clone()
        nothing = torch.empty(0, 2, 64).half()
        cuda_kv.kv_append(made.pool, made.tails, nothing, nothing, *made.step(new))
        assert torch.equal(made.pool, before)


def test_bad_input():
    made = paged("int8", 64, [40])
    k = torch.randn(2, 2, 64).half()
    pool, step = made.pool, made.step([2])

    def refused(match, pool=pool, k=k, **changes):
        with pytest.raises(RuntimeError, match=match):
            cuda_kv.kv_append(pool, None, k, k, *step[:4], changes.get("type", 2), changes.get("tokens", 64))

    refused("dtype: got f32", k=k.float())
    refused("pool: got block_tokens = 48, accepted are multiples of 32", tokens=48)
    refused("pool: int4 has tails", type=3)
    refused("pool: got type 4", type=4)
    refused("pool: got head_dim = 513", k=torch.zeros(2, 2, 513).half())
    unaligned = torch.zeros(pool.numel() + 1, dtype=torch.uint8)[1:].view(pool.shape)
    refused("must be 16-byte aligned", pool=unaligned)
