"""kv_append in Triton's interpreter: what is stored, to the last bit, is what the reference stores."""

import pytest
import torch

from memlm.kv_formats import TYPES
from memlm.ops._registry import implementations

from . import device
from .matmul_checks import DTYPES
from .paged import check_extremes, paged
from .test_cuda_kv_append import all_tokens, assert_same, emptied
from .test_kv_append import DIMS, LENGTHS
from .triton_interpreter import executed, interpret

interpret()
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from memlm import kernels  # noqa: E402
from memlm.kernels._kv import items, sequence_of  # noqa: E402
from memlm.kernels import kv_append as module  # noqa: E402

kv_append = kernels.implementation("kv_append")
rope_kv_append = executed(module.rope_kv_append, {0, 1})
types = pytest.mark.parametrize("type", TYPES)


def check(type, dim, turn, lengths):
    dtype = DTYPES[turn % 3]
    made = paged(type, dim, lengths, 1 + turn % 2, (32, 64, 96)[turn % 3], dtype, implementation="reference")
    pool, tails = emptied(made)
    kv_append(pool, tails, *all_tokens(made), *made.step(lengths))
    assert_same(pool, tails, made)


@types
def test_equals_the_specification(type):
    for turn, dim in enumerate((33, 128)):
        check(type, dim, 2 - turn, [1, 0, 37])


@types
@pytest.mark.gpu_proof
def test_equals_the_specification_everywhere(type):
    for turn, dim in enumerate([*DIMS, 512]):
        check(type, dim, turn, LENGTHS)


@types
@pytest.mark.parametrize("chunk", [7, pytest.param(1, marks=pytest.mark.gpu_proof)])
def test_independent_of_chunks(type, chunk):
    lengths = [20, 43]
    whole = paged(type, 80, lengths, 1, 32, torch.float16, implementation="reference")
    pool, tails = emptied(whole)
    for start in range(0, max(lengths), chunk):
        ends = [min(n, start + chunk) for n in lengths]
        starts = [min(n, start) for n in lengths]
        k, v = (
            torch.cat([x[begin:end] for x, begin, end in zip(both, starts, ends)])
            for both in (whole.k, whole.v)
        )
        rows = torch.tensor([0, *(end - begin for end, begin in zip(ends, starts))]).cumsum(0)
        kv_append(pool, tails, k, v, rows, torch.tensor(ends), *whole.step([])[2:])
    assert_same(pool, tails, whole)


@triton.jit
def dealt_kernel(rows, sequences, items, out):
    at = tl.program_id(0)
    tl.store(out + at, sequence_of(rows, sequences, tl.load(items + at), 3, 16, 2))


def test_who_has_an_item():
    """Of more sequences than one look finds; each has as many items as its rows may need."""
    new = torch.tensor([i * 7 % 50 if i % 3 else 0 for i in range(300)])
    rows = torch.tensor([0, *new]).cumsum(0)
    begin = rows[:-1] * 3 // 16 + 2 * torch.arange(300)
    end = torch.cat((begin[1:], torch.tensor([items(int(rows[-1]), 300, 3, 16, 2)])))
    assert (end - begin >= -(-new * 3 // 16) + 1).all()
    asked = torch.stack([begin[0], begin[0] + 1, end[127] - 1, begin[128], begin[255], end[-1] - 1, end[-1] + 9])
    out = torch.empty(7, dtype=torch.int32)
    executed(lambda *given: dealt_kernel[(7,)](*given) and None, {3})(rows, 300, asked, out)
    assert out.tolist() == [0, 0, 127, 128, 255, 299, 299]


def test_rows_that_are_not_there():
    """The host thinks of more rows than there are."""
    made = paged("bf16", 16, [3, 0, 18], 1, 32, torch.float16, implementation="reference")
    pool, _ = emptied(made)
    k, v = (torch.cat((x, torch.full((20, 1, 16), float("nan")).half())) for x in all_tokens(made))
    kv_append(pool, None, k, v, *made.step([3, 0, 18]))
    assert_same(pool, None, made)


def test_rows_that_lie_apart():
    made = paged("int8", 64, [10], 1, dtype=torch.float16)
    qkv = torch.randn(10, 4, 64).half()
    k, v = qkv[:, 2:3], qkv[:, 3:]
    across = torch.randn(64, 1, 10).half().permute(2, 1, 0)
    pools = []
    for k_, v_ in ((k, v), (k.contiguous(), v.contiguous()), (across, v), (across.contiguous(), v)):
        pools.append(made.pool.clone())
        kv_append(pools[-1], None, k_, v_, *made.step([10]))
    assert torch.equal(*pools[:2]) and torch.equal(*pools[2:]) and not torch.equal(pools[0], pools[2])


@pytest.mark.parametrize("type", ["int8", "int4"])
def test_extremes(type):
    check_extremes(kv_append, type)


def check_rope(type, dtype, lengths, new, dim, kv_heads, group):
    made = paged(type, dim, lengths, kv_heads, dtype=dtype, implementation="reference")
    generator, count = torch.Generator().manual_seed(3), sum(new)
    q, k, v = (
        torch.randn(count, heads, dim, generator=generator).to(dtype)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, new)])
    angles = torch.arange(max(lengths))[:, None] * 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    cos, sin = angles.cos(), angles.sin()
    for at in (positions, None):
        pool, tails = made.pool.clone(), None if made.tails is None else made.tails.clone()
        turned = rope_kv_append(pool, tails, q, k, v, cos, sin, at, *made.step(new))
        rows = torch.arange(count) if at is None else at
        c, s = (x[rows][:, None].double() for x in (cos, sin))
        a, b = q.double().chunk(2, dim=-1)
        expected = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
        # Two products and a sum in f32, then one rounding: at most the next number of the dtype.
        bound = (torch.finfo(dtype).eps / 2 * expected.abs() + 2**-22 * q.abs().amax()).clamp(min=2**-24)
        assert turned.dtype == dtype and ((turned.double() - expected).abs() <= bound).all()
        # As if another operation had turned the keys: its result is what the kernel makes of them as queries.
        wanted = made.pool.clone(), None if made.tails is None else made.tails.clone()
        keys = rope_kv_append(pool.clone(), tails, k, k, v, cos, sin, at, *made.step(new))
        implementations("kv_append")["reference"](*wanted, keys, v, *made.step(new))
        assert torch.equal(pool, wanted[0]) and (tails is None or torch.equal(tails, wanted[1]))


@pytest.mark.parametrize("type, dtype", [("bf16", torch.float16), ("int4", torch.bfloat16)])
def test_rope(type, dtype):
    """Queries against f64; of keys what is stored is what the reference stores of turned keys."""
    check_rope(type, dtype, [5, 0, 18], [1, 0, 3], 48, 1, 2)


@types
@pytest.mark.gpu_proof
@pytest.mark.parametrize("dim, dtype", zip((2, 64, 80), DTYPES))
def test_rope_everywhere(type, dim, dtype):
    check_rope(type, dtype, [20, 0, 35], [3, 0, 18], dim, 2, 3)


def test_no_tokens():
    for lengths, new in (([], []), ([5, 70], [0, 0])):
        made = paged("int4", 64, lengths)
        before, nothing = made.pool.clone(), torch.empty(0, 2, 64)
        kv_append(made.pool, made.tails, nothing, nothing, *made.step(new))
        assert torch.equal(made.pool, before)


def test_bad_input():
    """What the host sees is checked as on the CPU; numbers on the device are believed, as by CUDA's kernel."""
    made = paged("int8", 64, [40])
    before, k = made.pool.clone(), torch.randn(2, 2, 64)
    good = [made.pool, None, k, k, *made.step([2])]
    for error, match, at, wrong in [
        (TypeError, "k: got torch.float64", 2, k.double()),
        (ValueError, "v: got torch.float16", 3, k.half()),
        (ValueError, "tails: int4 has tails", 8, 3),
        (ValueError, "type: got 4", 8, 4),
        (ValueError, "block_tokens: got 48", 9, 48),
        (TypeError, "tables: got torch.int64", 6, made.tables.long()),
        (ValueError, "rows: got shape", 4, torch.zeros(3, dtype=torch.int64)),
    ]:
        with pytest.raises(error, match=match):
            kv_append(*good[:at], wrong, *good[at + 1 :])
    if not device.wanted():  # where the copy is aligned
        memory = torch.empty(made.pool.numel() + 16, dtype=torch.uint8)
        begin = 1 - memory.data_ptr() % 16
        unaligned = memory[begin % 16 :][: made.pool.numel()].view(made.pool.shape)
        with pytest.raises(ValueError, match="pool: got an address of 1 modulo 16"):
            kv_append(unaligned, *good[1:])
    angles = torch.zeros(2, 32)
    rope = [made.pool, None, k, k, k, angles, angles, None, *made.step([2])]
    for match, at, wrong in [
        (r"q: got torch.float16 \[2, 2, 64\]", 2, k.half()),
        ("q: got .*expected .* a multiple of 2", 2, torch.randn(2, 3, 64)),
        ("cos: got torch.float64", 5, angles.double()),
        (r"sin: got torch.float32 \[2, 64\]", 6, torch.zeros(2, 64)),
        (r"positions: got torch.int32 \[2\]", 7, torch.zeros(2, dtype=torch.int32)),
    ]:
        with pytest.raises(ValueError, match=match):
            rope_kv_append(*rope[:at], wrong, *rope[at + 1 :])
    with pytest.raises(ValueError, match="cos: got 1 angles, 2 tokens"):
        rope_kv_append(*rope[:5], angles[:1], angles[:1], None, *rope[8:])
    odd = paged("int8", 33, [2], 1)
    x = torch.zeros(2, 1, 33)
    with pytest.raises(ValueError, match="head_dim: got 33, RoPE takes even ones"):
        rope_kv_append(odd.pool, None, x, x, x, angles, angles, None, *odd.step([2]))
    assert torch.equal(made.pool, before)
