"""kv_append: what is stored, to the last bit, where the format says."""

import pytest
import torch

import memlm
from memlm import kv_formats
from memlm.kv_formats import LEAST, TYPES, ZEROS, KvFormat
from memlm.ops import kv_append
from memlm.ops._registry import implementations

from .paged import check_extremes, paged

PATHS = memlm.isas()
DIMS = [1, 16, 33, 64, 80, 96, 128, 256]
LENGTHS = [1, 31, 64, 65, 0, 130]

types = pytest.mark.parametrize("type", TYPES)


@types
@pytest.mark.parametrize("isa", PATHS)
def test_equals_the_specification(type, isa, restore_isa):
    memlm.set_isa(isa)
    for turn, dim in enumerate(DIMS):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
        case = {"lengths": LENGTHS, "kv_heads": 1 + turn % 3, "tokens": (32, 64, 96)[turn % 3]}
        made = paged(type, dim, **case, dtype=dtype)
        wanted = paged(type, dim, **case, dtype=dtype, implementation="reference")
        assert torch.equal(made.pool, wanted.pool)  # what belongs to no token is still 255
        if made.tails is not None:
            assert torch.equal(made.tails, wanted.tails)


@types
def test_pack_is_the_inverse_of_unpack(type):
    for dim in DIMS:
        format = KvFormat(type, 64, dim)
        generator = torch.Generator().manual_seed(dim)
        blocks = torch.randint(256, (2, 3, format.block_bytes), generator=generator, dtype=torch.uint8)
        assert torch.equal(kv_formats.pack(format, kv_formats.unpack(format, blocks)), blocks)


def code_at(block: bytes, start: int, bits: int, k: int, row: int) -> int:
    """The code of a tile that begins at `start`, as the module draws it."""
    if bits == 8:
        code = block[start + (k // 4 * 16 + row) * 4 + k % 4]
        return code - 256 if code > 127 else code
    run, k = divmod(k, 32)
    start += run * 32 * 16 * bits // 8
    code = block[start + (k // 8 * 16 + row) * 4 + k % 4] >> (k % 8 // 4 * 4) & 15
    if bits == 5:
        bit = (k // 4 * 16 + row) * 4 + k % 4
        code |= (block[start + 256 + bit // 8] >> bit % 8 & 1) << 4
    return code


@pytest.mark.parametrize("type", ["int8", "int4"])
def test_every_code_by_its_place(type):
    tokens, dim = 64, 96  # three groups of 32
    made = paged(type, dim, [40], kv_heads=1, tokens=tokens)
    block = bytes(made.pool[0, made.tables[0, 0]].tolist())
    scales = torch.frombuffer(bytearray(block), dtype=torch.float16)
    key_bits, value_bits = made.format.bits
    values = tokens * dim * key_bits // 8
    key_scales = values + tokens * dim * value_bits // 8
    value_scales = key_scales + tokens * 3 * 2
    for t in range(40):
        for is_value, bits in enumerate((key_bits, value_bits)):
            x = kv_formats.hadamard((made.v if is_value else made.k)[0][t, 0])
            for c in range(dim):
                if is_value:
                    code = code_at(block, values + c // 16 * tokens * 2 * value_bits, bits, t, c % 16)
                    scale = scales[value_scales // 2 + c // 32 * tokens + t]
                else:
                    code = code_at(block, t // 16 * dim * 2 * key_bits, bits, c, t % 16)
                    scale = scales[key_scales // 2 + (t // 16 * 3 + c // 32) * 16 + t % 16]
                # Half a step; a whole one where the largest code has no place on this side.
                step = abs(scale.item())
                off = abs((code - ZEROS[bits]) * scale.item() - x[c].item())
                clamped = bits < 8 and code - ZEROS[bits] == -LEAST[bits] - 1
                assert off <= step * ((1 if clamped else 0.5) + 2**-9 * abs(LEAST[bits]))


@pytest.mark.parametrize("type, dtype", [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_number_by_its_place(type, dtype):
    made = paged(type, 33, [40], kv_heads=1)
    numbers = made.pool[0, made.tables[0, 0]].view(dtype)
    k, v = made.k[0][:, 0].to(dtype), made.v[0][:, 0].to(dtype)
    for t in range(40):
        for c in range(33):
            assert numbers[(t // 16 * 33 + c) * 16 + t % 16] == k[t, c]
            assert numbers[64 * 33 + (c // 16 * 64 + t) * 16 + c % 16] == v[t, c]


def test_hadamard():
    """Against its matrix, and its own inverse; in pieces where the size is no power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 32:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (x.view(5, 3, 32) @ matrix / 32**0.5).view(5, 96)
    torch.testing.assert_close(kv_formats.hadamard(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(kv_formats.hadamard(expected), x, rtol=0, atol=1e-6)


@types
def test_independent_of_chunks_and_threads(type, restore_threads):
    whole = paged(type, 80, [70, 133], kv_heads=3)
    for chunk, threads in ((1, 1), (7, 2), (64, 3), (65, 8)):
        torch.set_num_threads(threads)
        pool = torch.full_like(whole.pool, 255)
        tails = None if whole.tails is None else torch.full_like(whole.tails, 255)
        for start in range(0, 133, chunk):
            ends = torch.tensor([min(n, start + chunk) for n in whole.lengths])
            starts = [min(n, start) for n in whole.lengths]
            new = [end - begin for end, begin in zip(ends.tolist(), starts)]
            k, v = (
                torch.cat([x[begin:end] for x, begin, end in zip(both, starts, ends.tolist())])
                for both in (whole.k, whole.v)
            )
            rows = torch.tensor([0, *new]).cumsum(0)
            kv_append(pool, tails, k, v, rows, ends, *whole.step([])[2:])
        assert torch.equal(pool, whole.pool)
        assert tails is None or torch.equal(tails, whole.tails)


@types
def test_rows_that_lie_apart(type):
    """Keys and values as slices of one product's result."""
    made = paged(type, 64, [50])
    qkv = torch.randn(50, 8, 64)
    k, v = qkv[:, 4:6], qkv[:, 6:]
    pools = []
    for k_, v_ in ((k, v), (k.contiguous(), v.contiguous()), (k, v.contiguous())):
        pools.append(made.pool.clone())
        kv_append(pools[-1], made.tails, k_, v_, *made.step([50]))
    assert torch.equal(pools[0], pools[1]) and torch.equal(pools[0], pools[2])


@pytest.mark.parametrize("type", ["int8", "int4"])
@pytest.mark.parametrize("isa", PATHS)
def test_extremes(type, isa, restore_isa):
    memlm.set_isa(isa)
    check_extremes(kv_append, type)


@types
def test_torch(type):
    made = paged(type, 64, [40, 3])
    args = (made.pool, made.tails, torch.randn(3, 2, 64), torch.randn(3, 2, 64), *made.step([2, 1]))
    torch.library.opcheck(torch.ops.memlm.kv_append.default, args)


def test_bad_input_changes_nothing():
    made = paged("int8", 64, [40, 3])
    rows, lengths, tables = made.step([2, 1])[:3]
    before = made.pool.clone()
    good = {
        "pool": made.pool, "tails": None, "tail_of": None, "k": torch.randn(3, 2, 64),
        "v": torch.randn(3, 2, 64), "rows": rows, "lengths": lengths, "tables": tables, "type": 2,
        "block_tokens": 64,
    }  # fmt: skip
    far = tables.clone()
    far[0, 0] = 99
    for error, match, wrong in [
        (TypeError, "pool: got torch.int8", {"pool": made.pool.view(torch.int8)}),
        (ValueError, "pool: got shape", {"pool": made.pool[:, :, 1:].contiguous()}),
        (ValueError, "contiguous", {"pool": made.pool[:, ::2]}),
        (TypeError, "k: got torch.float64", {"k": good["k"].double()}),
        (TypeError, "v: got list", {"v": [1.0]}),
        (ValueError, r"k: got shape \[3, 128\]", {"k": good["k"].flatten(1)}),
        (ValueError, "k: got 1 heads", {"k": good["k"][:, :1], "v": good["v"][:, :1]}),
        (ValueError, "v: got torch.bfloat16", {"v": good["v"].bfloat16()}),
        (TypeError, "rows: got torch.int32", {"rows": rows.int()}),
        (ValueError, "rows: got shape", {"rows": rows[:-1]}),
        (ValueError, "rows: got .*expected to go from 0 to 3", {"rows": rows + 1}),
        (ValueError, "sequence 0 has -1 new", {"rows": torch.tensor([0, -1, 3])}),
        (ValueError, "sequence 1 has 1 new of 0", {"lengths": torch.tensor([40, 0])}),
        (TypeError, "tables: got torch.int64", {"tables": tables.long()}),
        (ValueError, "tables: 1 blocks do not hold the 65", {"lengths": torch.tensor([65, 3])}),
        (ValueError, "tables: got .* the pool has", {"tables": far}),
        (ValueError, "tables: got .*-1", {"tables": torch.full_like(tables, -1)}),
        (ValueError, "tails: int4 has tails", {"tails": made.pool}),
        (ValueError, "tails: int4 has tails", {"type": 3}),
        (ValueError, "type: got 4", {"type": 4}),
        (ValueError, "block_tokens: got 40", {"block_tokens": 40}),
    ]:
        with pytest.raises(error, match=match):
            kv_append(**{**good, **wrong})
        assert torch.equal(made.pool, before)
    reference = implementations("kv_append")["reference"]
    with pytest.raises(ValueError, match="the pool has"):
        reference(**{**good, "tables": far})
    assert torch.equal(made.pool, before)


def test_a_wrong_tail_changes_nothing():
    made = paged("int4", 64, [40, 3])
    rows, lengths, tables, tail_of, *kind = made.step([2, 1])
    before, k = made.pool.clone(), torch.randn(3, 2, 64)
    for error, match, tails, wrong in [
        (ValueError, r"tail_of: got \[2, 3\]", made.tails, tail_of + torch.tensor([0, 2], dtype=torch.int32)),
        (ValueError, "tail_of: got shape", made.tails, tail_of[:1]),
        (TypeError, "tail_of: got torch.int64", made.tails, tail_of.long()),
        (ValueError, "tails: got shape", made.tails[:, :, 1:].contiguous(), tail_of),
        (ValueError, "tail_of: int4 has tails", made.tails, None),
    ]:
        with pytest.raises(error, match=match):
            kv_append(made.pool, tails, k, k, rows, lengths, tables, wrong, *kind)
        assert torch.equal(made.pool, before)
