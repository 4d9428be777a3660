"""PagedKVCache against plain lists of the tokens that each sequence should hold."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memlm import kv_formats
from memlm.errors import OutOfBlocks
from memlm.kv_cache import NOWHERE, PagedKVCache
from memlm.kv_formats import KvFormat

LAYERS, HEADS, DIM, BLOCK = 2, 2, 16, 32


def vectors(ids: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, HEADS, DIM] that tell which token and layer they are of."""
    generator = torch.Generator().manual_seed(layer)
    table = torch.randn(2, 500, HEADS, DIM, generator=generator)
    return table[0, ids], table[1, ids]


def expected(ids: list[int], layer: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache gives back of them, [HEADS, tokens, DIM]."""
    both, format = [], KvFormat(dtype, BLOCK, DIM)
    for x, bits in zip(vectors(ids, layer), format.bits):
        if format.quantized:
            codes = kv_formats.quantize(format, x, bits)
            x = kv_formats.hadamard(kv_formats.rotated(format, *codes, bits, torch.float32))[
                ..., :DIM
            ]
        else:
            x = x.to(kv_formats.FLOATS[dtype]).float()
        both.append(x.transpose(0, 1))
    return both[0], both[1]


def run_step(cache: PagedKVCache, new: dict[int, list[int]], with_ids=True, commit=True) -> None:
    step = cache.begin_step({s: len(ids) for s, ids in new.items()})
    joined = [i for ids in new.values() for i in ids]
    for layer in range(LAYERS):
        cache.append(step, layer, *vectors(joined, layer))
    if commit:
        cache.commit(step, new if with_ids else None)


def tail_of(cache: PagedKVCache, s: int, ids: list[int], layer: int):
    """Of keys and of values, what the tail has of the block that is not full, what it should hold
    without rounding, and the steps to which the block's codes are rounded; [tokens, HEADS, width]."""
    format, count = cache.format, len(ids) % BLOCK
    if count == 0:
        return
    tail = cache.tails[layer][:, cache._sequences[s].tail]
    held = kv_formats.unpack(format.tail, tail)
    padding = (0, format.width - DIM)
    for got, x, bits in zip((held.keys, held.values), vectors(ids[-count:], layer), format.bits):
        exact = kv_formats.hadamard(torch.nn.functional.pad(x, padding))
        steps = kv_formats.quantize(format, x, bits)[1].float().abs()
        yield got[:, :count].transpose(0, 1).float(), exact, steps


def state(cache: PagedKVCache):
    """All that can be seen of a cache but for what its blocks hold."""
    tables = {s: (cache.length(s), cache.table(s)) for s in cache.sequences}
    return tables, cache.used_bytes, cache.nbytes


def blocks_needed(cache: PagedKVCache, new: dict[int, int]) -> int:
    """From the tables alone: new blocks, and copies of those that not only writers hold."""
    users = [block for s in cache.sequences for block in cache.table(s)]
    needed, written = 0, {}
    for s, count in new.items():
        table, length = cache.table(s), cache.length(s)
        needed += -(-(length + count) // BLOCK) - len(table)
        if length % BLOCK:
            written[table[-1]] = written.get(table[-1], 0) + 1
    for block, writers in written.items():
        needed += writers if users.count(block) > writers else writers - 1
    return needed


class Machine(RuleBasedStateMachine):
    @initialize(
        dtype=st.sampled_from(kv_formats.TYPES),
        blocks=st.sampled_from([None, 9]),
        window=st.sampled_from([None, 1, 33, 40]),
    )
    def start(self, dtype, blocks, window):
        self.dtype, self.window = dtype, window
        self.cache = PagedKVCache(LAYERS, HEADS, DIM, dtype, BLOCK, blocks, window)
        self.model: dict[int, list[int]] = {}
        self.freed: list[int] = []

    def some(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule()
    def add(self):
        if len(self.model) < 5:
            s = self.cache.add()
            assert s not in self.model and s not in self.freed
            self.model[s] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=st.lists(st.integers(0, 499), max_size=3))
    def add_with_prefix(self, data, more):
        if len(self.model) < 5:
            ids = self.model[self.some(data)] + more
            s = self.cache.add(ids)
            there = self.cache.length(s)
            assert there % BLOCK == 0 and (there < len(ids) or there == 0)
            self.model[s] = ids[:there]

    # Few ids: prefixes meet again.
    @precondition(lambda self: self.model)
    @rule(
        data=st.data(),
        count=st.integers(1, 3),
        kind=st.sampled_from(["ids", "ids", "ids", "no ids", "given up"]),
    )
    def step(self, data, count, kind):
        new = {}
        for _ in range(count):
            length = data.draw(st.sampled_from([1, 2, 31, 32, 33, 70]))
            first = data.draw(st.integers(0, 3))
            new[self.some(data)] = [(first + i // 30) % 500 for i in range(length)]
        counts = {s: len(ids) for s, ids in new.items()}
        room = self.cache.count - self.cache.used_blocks
        needed, before = blocks_needed(self.cache, counts), state(self.cache)
        try:
            run_step(self.cache, new, kind == "ids", kind != "given up")
        except OutOfBlocks:
            assert self.cache.fixed and needed > room
            assert state(self.cache) == before
            return
        assert not self.cache.fixed or needed <= room
        if kind == "given up":  # any change of the cache ends it
            s = self.cache.add()
            self.cache.free(s)
            self.freed.append(s)
        else:
            for s, ids in new.items():
                self.model[s] = self.model[s] + ids

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data):
        if len(self.model) < 5:
            old, used = self.some(data), self.cache.used_blocks
            self.model[self.cache.fork(old)] = self.model[old].copy()
            assert self.cache.used_blocks == used

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        s = self.some(data)
        self.cache.free(s)
        del self.model[s]
        self.freed.append(s)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def free_twice(self, data):
        s, before = data.draw(st.sampled_from(self.freed)), state(self.cache)
        for wrong in (
            lambda: self.cache.free(s), lambda: self.cache.fork(s), lambda: self.cache.begin_step({s: 1}),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="is not in the cache"):
                wrong()
        assert state(self.cache) == before

    @precondition(lambda self: self.model)
    @rule(data=st.data(), share=st.integers(0, 8))
    def truncate(self, data, share):
        s = self.some(data)
        length = len(self.model[s]) * share // 8
        first = max(0, length - self.window + 1) if self.window else 0
        table, before = self.cache.table(s), state(self.cache)
        if NOWHERE in table[first // BLOCK : -(-length // BLOCK)]:
            with pytest.raises(ValueError, match="have been evicted"):
                self.cache.truncate(s, length)
            assert state(self.cache) == before
        else:
            self.cache.truncate(s, length)
            self.model[s] = self.model[s][:length]

    @invariant()
    def holds_the_tokens(self):
        if not hasattr(self, "cache"):
            return
        assert set(self.cache.sequences) == set(self.model)
        for s, ids in self.model.items():
            assert self.cache.length(s) == len(ids)
            table = self.cache.table(s)
            assert len(table) == -(-len(ids) // BLOCK)
            evicted = table.count(NOWHERE)
            assert NOWHERE not in table[evicted:]
            seen = max(0, len(ids) - self.window + 1) if self.window else 0
            assert evicted <= seen // BLOCK
            for layer in range(LAYERS):
                wanted = expected(ids, layer, self.dtype)
                for got, want in zip(self.cache.read(s, layer), wanted):
                    assert not got[:, : evicted * BLOCK].any()
                    assert torch.equal(got[:, evicted * BLOCK :], want[:, evicted * BLOCK :])

    @invariant()
    def tails_are_of_the_newest_tokens(self):
        """Unrounded, or made again of what was."""
        if not hasattr(self, "cache") or not self.cache.tails:
            return
        for s, ids in self.model.items():
            for layer in range(LAYERS):
                for got, exact, step in tail_of(self.cache, s, ids, layer):
                    assert ((got - exact).abs() <= 1.01 * step + 2**-8 * exact.abs()).all()

    @invariant()
    def counts_its_blocks(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        held = {b for s in self.model for b in cache.table(s) if b != NOWHERE}
        assert held <= set(range(cache.count))
        tails = [s.tail for s in cache._sequences.values() if s.tail != NOWHERE]
        assert cache.used_blocks == len(held)
        assert cache.used_bytes == len(held) * cache.block_bytes + len(tails) * cache.tail_bytes
        count = cache.tails[0].shape[1] if cache.tails else 0
        assert cache.nbytes == cache.count * cache.block_bytes + count * cache.tail_bytes
        assert sorted(tails + cache._free_tails) == list(range(count))
        # Each block is held, idle or free: none leaks.
        idle, free = set(cache._idle), set(cache._free)
        assert len(cache._free) == len(free) and not (held & idle or held & free or idle & free)
        assert held | idle | free == set(range(cache.count))
        users = [b for s in self.model for b in cache.table(s)]
        assert [users.count(b) for b in range(cache.count)] == cache._users


Machine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
TestMachine = Machine.TestCase


def cache_of(lengths: list[int], **options) -> tuple[PagedKVCache, list[int]]:
    cache = PagedKVCache(LAYERS, HEADS, DIM, "f32", BLOCK, **options)
    sequences = [cache.add() for _ in lengths]
    for s, length in zip(sequences, lengths):
        if length:
            run_step(cache, {s: [i % 7 for i in range(length)]})
    return cache, sequences


def test_a_prefix_is_shared_and_outlives_its_sequence():
    cache, (first,) = cache_of([100], blocks=8)
    ids = [i % 7 for i in range(100)]
    second = cache.add(ids)
    assert cache.length(second) == 96 and cache.table(second) == cache.table(first)[:3]
    cache.free(first)
    cache.free(second)
    assert cache.used_bytes == 0
    third = cache.add(ids[:96])  # one token at least is left to compute
    assert cache.length(third) == 64 and cache.used_blocks == 2
    assert cache.length(cache.add([*ids[:40], 99, *ids[41:]])) == 32
    for got, want in zip(cache.read(third, 1), expected(ids[:64], 1, "f32")):
        assert torch.equal(got, want)


def test_a_prefix_gives_way_to_need():
    cache, (first,) = cache_of([96], blocks=3)
    cache.free(first)
    other = cache.add()
    run_step(cache, {other: [9] * 64})
    # The last blocks went first.
    assert cache.length(cache.add([i % 7 for i in range(96)])) == 32


def test_overwriting_a_shared_prefix():
    """A block in the index whose sequence goes back and takes another turn."""
    cache, (s,) = cache_of([64])
    ids = [i % 7 for i in range(64)]
    cache.truncate(s, 40)
    other = cache.add([*ids, 0])
    assert cache.length(other) == 64
    run_step(cache, {s: [99] * 24})
    assert torch.equal(cache.read(other, 0)[0], expected(ids, 0, "f32")[0])
    cache.free(other)
    assert torch.equal(cache.read(s, 0)[0], expected([*ids[:40], *[99] * 24], 0, "f32")[0])


def test_fork_copies_only_the_last_block():
    cache, (s,) = cache_of([70])
    other = cache.fork(s)
    assert cache.used_blocks == 3
    run_step(cache, {s: [1]})
    assert cache.used_blocks == 4 and cache.table(s)[:2] == cache.table(other)[:2]
    run_step(cache, {other: [2]})
    assert cache.used_blocks == 4


def test_unequal_lengths_waste_less_than_a_block_each():
    lengths = [1, 31, 32, 33, 100, 257]
    cache, sequences = cache_of(lengths)
    assert cache.used_blocks == sum(-(-n // BLOCK) for n in lengths)
    waste = cache.used_bytes - sum(lengths) * cache.bytes_per_token
    assert 0 <= waste < len(lengths) * cache.block_bytes
    assert cache.nbytes == PagedKVCache.bytes_for(lengths, LAYERS, HEADS, DIM, "f32", BLOCK)
    fixed = PagedKVCache(LAYERS, HEADS, DIM, "f32", BLOCK, cache.used_blocks)
    assert fixed.nbytes == PagedKVCache.bytes_for(lengths, LAYERS, HEADS, DIM, "f32", BLOCK, True)
    for s in sequences:
        cache.free(s)
    assert cache.used_bytes == 0


@pytest.mark.parametrize("dtype, bits", [("f32", 32), ("bf16", 16), ("int8", 8.25), ("int4", 4.75)])
def test_bytes_per_token(dtype, bits):
    cache = PagedKVCache(30, 3, 64, dtype)
    assert cache.bytes_per_token == 30 * 3 * 64 * 2 * bits / 8


def test_growing_keeps_one_old_store():
    cache, (s,) = cache_of([BLOCK * 4])
    made, alive = [], []

    class Counted(PagedKVCache):
        def _store(self, format, blocks):
            alive.append(sum(p.shape[1] == 4 for p in self.pools))
            made.append(blocks)
            return super()._store(format, blocks)

    cache.__class__ = Counted
    run_step(cache, {s: [1]})
    # When a layer's new store is made, the old ones of the layers before are gone.
    assert made == [8] * LAYERS and alive == list(range(LAYERS, 0, -1))


def test_growth_that_fails_changes_nothing():
    cache, (s,) = cache_of([BLOCK * 4])
    ids = [i % 7 for i in range(BLOCK * 4)]
    before = cache.length(s), cache.table(s), cache.used_bytes

    class Full(PagedKVCache):
        left = 1

        def _store(self, format, blocks):
            if not self.left:
                raise MemoryError
            self.left -= 1
            return super()._store(format, blocks)

    cache.__class__ = Full
    with pytest.raises(MemoryError):
        cache.begin_step({s: 1})
    assert before == (cache.length(s), cache.table(s), cache.used_bytes)
    cache.__class__ = PagedKVCache
    run_step(cache, {s: [3]})
    for layer in range(LAYERS):
        assert torch.equal(cache.read(s, layer)[0], expected([*ids, 3], layer, "f32")[0])


def test_steps():
    cache, (s, t) = cache_of([40, 10])
    step = cache.begin_step({t: 2, s: 3})
    assert step.rows.tolist() == [0, 2, 5] and step.lengths.tolist() == [12, 43]
    assert step.positions.tolist() == [10, 11, 40, 41, 42]
    assert step.tables.tolist() == [[*cache.table(t), NOWHERE], list(cache.table(s))]
    cache.commit(step)
    assert (cache.length(s), cache.length(t)) == (43, 12)


def test_attention_is_that_of_the_dense_matrices():
    cache, (s, t) = cache_of([70, 33], window=50)
    step = cache.begin_step({s: 3, t: 1})
    k, v = vectors([1, 2, 3, 4], 1)
    q = torch.randn(4, 3 * HEADS, DIM, generator=torch.Generator().manual_seed(1))
    got = cache.attend(step, 1, q, k, v)
    cache.commit(step)
    for sequence, rows in ((s, slice(0, 3)), (t, slice(3, 4))):
        keys, values = (x.double().repeat_interleave(3, dim=0) for x in cache.read(sequence, 1))
        n, count = keys.shape[1], rows.stop - rows.start
        scores = q[rows].double().transpose(0, 1) @ keys.transpose(1, 2) / DIM**0.5
        distance = torch.arange(n - count, n)[:, None] - torch.arange(n)
        scores = scores.masked_fill((distance < 0) | (distance >= 50), -torch.inf)
        exact = (scores.softmax(-1) @ values).transpose(0, 1)
        torch.testing.assert_close(got[rows].double(), exact, rtol=0, atol=1e-5)


def test_tails_are_unrounded():
    cache = PagedKVCache(LAYERS, HEADS, DIM, "int4", BLOCK)
    ids = [i % 7 for i in range(140)]
    s = cache.add()

    def exactly(sequence, ids):
        for layer in range(LAYERS):
            for got, exact, _ in tail_of(cache, sequence, ids, layer):
                if not torch.equal(got, exact.bfloat16().float()):
                    return False
        return True

    for start, end in ((0, 10), (10, 11), (11, 70), (70, 140)):
        run_step(cache, {s: ids[start:end]})
        assert exactly(s, ids[:end])
    other = cache.fork(s)
    run_step(cache, {s: [1]})
    assert exactly(other, ids) and exactly(s, [*ids, 1])
    cache.truncate(s, 135)
    assert exactly(s, ids[:135])
    cache.truncate(s, 128)
    cache.truncate(s, 100)  # in the block before: of rounded numbers
    assert not exactly(s, ids[:100])
    run_step(cache, {other: ids[:30]}, commit=False)  # into the next block, and given up
    cache.free(s)
    assert not exactly(other, ids)
    run_step(cache, {other: ids[:21]})
    assert exactly(other, [*ids, *ids[:21]])


@pytest.mark.parametrize("dtype", kv_formats.TYPES)
def test_attention_by_any_steps(dtype):
    """All at once, in pieces, together with others: the same but for the rounding of sums (of int8 and
    int4: of weights to int8, each to half a step of 1/127 of the largest)."""
    n, results = 150, []
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(n, 2 * HEADS, DIM, generator=generator)
    k, v = vectors([i % 499 for i in range(n)], 0)
    for piece, others in ((150, 0), (1, 0), (40, 2), (7, 1)):
        cache = PagedKVCache(1, HEADS, DIM, dtype, BLOCK)
        s, beside = cache.add(), [cache.add() for _ in range(others)]
        rows = []
        for start in range(0, n, piece):
            end = min(n, start + piece)
            new = {**{o: 3 for o in beside[:1]}, s: end - start, **{o: 40 for o in beside[1:]}}
            step, first = cache.begin_step(new), 3 * (others > 0)
            x = [torch.randn(len(step.positions), *t.shape[1:]) for t in (q, k, v)]
            for t, whole in zip(x, (q, k, v)):
                t[first : first + end - start] = whole[start:end]
            rows.append(cache.attend(step, 0, *x)[first : first + end - start])
            cache.commit(step)
        results.append(torch.cat(rows))
    off = {"f32": 1e-5, "bf16": 1e-5, "int8": 0.1, "int4": 0.1}[dtype]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=off)


def test_pieces_of_a_step():
    cache = PagedKVCache(1, 1, 16, "int4", BLOCK)
    a, b, c, d = (cache.add() for _ in range(4))
    step = cache.begin_step({a: 3, b: 70, c: 2, d: 1})
    pieces = [(rows.start, rows.stop, p.sequences, p.lengths.tolist()) for rows, p in step.pieces]
    assert pieces == [
        (0, 3, (a,), [3]), (3, 35, (b,), [32]), (35, 67, (b,), [64]), (67, 73, (b,), [70]),
        (73, 76, (c, d), [2, 1]),
    ]  # fmt: skip
    cache.commit(step)
    (rows, whole), = cache.begin_step({a: 1, b: 1}).pieces
    assert rows == slice(None) and whole.lengths.tolist() == [4, 71]


def test_bad_input():
    for match, options in [
        ("dtype: got 'int3'", {"dtype": "int3"}),
        ("block_tokens: got 48", {"block_tokens": 48}),
        ("head_dim: got 0", {"head_dim": 0}),
        ("layers: got 0", {"layers": 0}),
        ("blocks: got -1", {"blocks": -1}),
        ("window: got 0", {"window": 0}),
    ]:
        with pytest.raises(ValueError, match=match):
            PagedKVCache(**{"layers": 1, "kv_heads": 1, "head_dim": 16, **options})
    cache, (s,) = cache_of([10])
    step = cache.begin_step({s: 2})
    k, v = vectors([1, 2], 0)
    for error, match, wrong in [
        (ValueError, "new: got 0 tokens", lambda: cache.begin_step({s: 0})),
        (ValueError, "length: got 11", lambda: cache.truncate(s, 11)),
        (ValueError, "layer: got 2", lambda: cache.append(step, 2, k, v)),
        (ValueError, "layer: got 2", lambda: cache.read(s, 2)),
        (TypeError, "k: got torch.int64", lambda: cache.append(step, 0, k.long(), v.long())),
        (ValueError, "k: got 1 heads", lambda: cache.append(step, 0, k[:, :1], v[:, :1])),
        (ValueError, "v: got", lambda: cache.append(step, 0, k, v[:1])),
        (ValueError, "ids: got 1 for 2", lambda: cache.commit(step, {s: [1]})),
    ]:
        with pytest.raises(error, match=match):
            wrong()
    cache.commit(step)
    with pytest.raises(ValueError, match="step: is not open"):
        cache.commit(step)
