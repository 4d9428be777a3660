"""The paged key-value cache: keys and values of many sequences in blocks from one pool.

A sequence has a table of block numbers, the same for all layers; block b of layer i is
``pools[i][:, b]``, of ``block_tokens`` tokens (PagedAttention, arXiv:2309.06180;
memlm/kv_formats.py draws a block).  Blocks are counted: forks and common beginnings share them, and
who writes to a shared block gets a copy first.  So memory is what the tokens need, and less than one
block for each sequence beyond.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from memlm import kv_formats
from memlm.errors import OutOfBlocks
from memlm.kv_formats import KvFormat
from memlm.ops.kv_append import kv_append
from memlm.ops.paged_attention import paged_attention

NOWHERE = -1  # a table entry without a block: evicted
MOST_BLOCKS = 2**31 - 1  # tables are int32


@dataclass
class _Sequence:
    length: int = 0
    blocks: list[int] = field(default_factory=list)  # NOWHERE before the window
    # Token ids and, of each full block, its node in the prefix index; None once tokens without ids
    # were committed.
    ids: list[int] | None = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    tail: int = NOWHERE  # where it has one
    unrounded: int = NOWHERE  # which of its blocks that holds


@dataclass(frozen=True, eq=False)
class Step:
    """New tokens of some sequences, one after the other, as the ops take them: ``rows`` int64
    ``[n + 1]``, ``lengths`` int64 ``[n]`` (new tokens included), ``tables`` int32 ``[n, blocks]``;
    ``positions`` int64 ``[tokens]``, of each new token in its sequence; ``tail_of`` int32 ``[n]``,
    for int4.

    ``pieces``: what attends at once, as (tokens of the step, their own step).  With tails, tokens
    that go beyond the end of a block are cut there, otherwise that is all of the step."""

    sequences: tuple[int, ...]
    counts: tuple[int, ...]
    rows: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    positions: torch.Tensor
    tail_of: torch.Tensor | None
    pieces: list[tuple[slice, Step]] = field(default_factory=list)


class PagedKVCache:
    """Keys and values of ``layers`` layers of ``kv_heads`` heads of size ``head_dim``, stored as
    ``dtype``: ``"f32"``, ``"bf16"``, ``"int8"`` or ``"int4"``, rounded token by token.

    A step of a model, for sequences of any lengths at once::

        s = cache.add()
        step = cache.begin_step({s: 5})             # blocks for 5 more tokens
        for layer in range(layers):
            y = cache.attend(step, layer, q, k, v)  # [5, heads or kv_heads, head_dim]
        cache.commit(step, {s: ids})                # now they count; ids only for prefix sharing

    ``blocks`` fixes the size of the pool (of each layer); None lets it double when it is full, one
    layer's store at a time, so that beside the pool only one old store exists.  A store is memory
    that is not resident until it is used.  With ``window``, queries see that many tokens, themselves
    included, and blocks wholly before are given back at each :meth:`commit`.

    int4 keeps the newest block of each sequence unrounded as well, its tail (memlm/kv_formats.py);
    where a tail is lost, because a sequence was cut back beyond its newest block, it is made again of
    the rounded numbers.

    All methods but those that write keys and values cost time in the number of blocks concerned, not
    in their bytes, and for int4 in those of a tail; ``append`` takes that of the new tokens, ``attend``
    that of the blocks seen.

    Whatever a method raises, the cache is as it was before.  Raises ValueError for sizes out of
    range.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "bf16",
        block_tokens: int = 64,
        blocks: int | None = None,
        window: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.format = KvFormat(dtype, block_tokens, head_dim)
        for name, value, most in (
            ("layers", layers, None), ("kv_heads", kv_heads, None), ("blocks", blocks, MOST_BLOCKS),
            ("window", window, None),
        ):  # fmt: skip
            if value is not None and (value < 1 or (most and value > most)):
                raise ValueError(
                    f"{name}: got {value}, accepted is 1 {f'to {most}' if most else 'or above'}"
                )
        self.layers, self.kv_heads, self.window = layers, kv_heads, window
        self.fixed = blocks is not None
        self.device = torch.device(device)
        self.count = blocks or 0  # blocks of the pool
        self.pools = [self._store(self.format, self.count) for _ in range(layers)]
        # Of int4: a tail for each sequence, [kv_heads, tails, bytes].
        self.tails = [self._store(self.format.tail, 0) for _ in range(layers if self.format.tail else 0)]
        self._free_tails: list[int] = []
        self._users: list[int] = [0] * self.count  # of each block
        self._free = list(range(self.count - 1, -1, -1))
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._step: Step | None = None
        self._tables: tuple[tuple[int, ...], torch.Tensor] | None = None  # of these sequences, now
        # Prefix index: full blocks by what they hold and what came before.
        self._nodes: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # -> (node, block)
        self._key_of: dict[int, tuple] = {}  # block -> its key in _nodes
        self._next_node = 1
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # in the index, without users; oldest first

    # Sizes.

    def _store(self, format: KvFormat, blocks: int) -> torch.Tensor:
        shape = (self.kv_heads, blocks, format.block_bytes)
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, in all layers."""
        return self.layers * self.kv_heads * self.format.block_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token of a full block, in all layers."""
        return self.block_bytes / self.format.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the pool and of tails, filled or not."""
        return sum(store.numel() for store in (*self.pools, *self.tails))

    @property
    def tail_bytes(self) -> int:
        """Bytes of a sequence's tail, in all layers; 0 but for int4."""
        return self.layers * self.kv_heads * self.format.tail.block_bytes if self.tails else 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that sequences hold, shared ones once, and of their tails."""
        tails = sum(s.tail != NOWHERE for s in self._sequences.values())
        return self.used_blocks * self.block_bytes + tails * self.tail_bytes

    @property
    def used_blocks(self) -> int:
        return self.count - len(self._free) - len(self._idle)

    @staticmethod
    def bytes_for(
        lengths: Iterable[int],
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "bf16",
        block_tokens: int = 64,
        fixed: bool = False,
    ) -> int:
        """``nbytes`` of a cache that holds sequences of these lengths, nothing shared, no window: with
        a growing pool, or with ``fixed`` the smallest that has room for them."""
        format = KvFormat(dtype, block_tokens, head_dim)
        counts = [-(-length // block_tokens) for length in lengths]
        blocks = sum(counts) if fixed else _power(sum(counts))
        size = blocks * format.block_bytes
        if format.tail:
            size += _power(sum(count > 0 for count in counts)) * format.tail.block_bytes
        return layers * kv_heads * size

    # Sequences.

    @property
    def sequences(self) -> tuple[int, ...]:
        """The handles of all sequences, in the order they were added."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens committed.  Raises ValueError for an unknown sequence."""
        return self._get(sequence).length

    def table(self, sequence: int) -> tuple[int, ...]:
        """The numbers of its blocks, -1 for evicted ones.  Raises ValueError for an unknown
        sequence."""
        return tuple(self._get(sequence).blocks)

    def add(self, ids: Sequence[int] = ()) -> int:
        """A new sequence; its handle.

        Where ``ids`` begin as sequences did whose ids were committed, their full blocks are shared,
        as long as nobody needed the memory for others since: :meth:`length` says how many of the ids
        are already there, always less than all.
        """
        ids = [int(i) for i in ids]
        added = _Sequence()
        parent = 0
        for start in range(0, len(ids) - self.format.tokens, self.format.tokens):
            key = (parent, tuple(ids[start : start + self.format.tokens]))
            if key not in self._nodes:
                break
            parent, block = self._nodes[key]
            self._take(block)
            added.blocks.append(block)
            added.nodes.append(parent)
            added.ids.extend(key[1])
        added.length = len(added.ids)
        return self._enter(added)

    def fork(self, sequence: int) -> int:
        """A copy of a sequence; its handle.  All blocks are shared; the last, if it is not full, is
        copied when either appends to it.  Ends an open step.  Raises ValueError for an unknown
        sequence."""
        old = self._get(sequence)
        self._give_up()
        ids = None if old.ids is None else old.ids.copy()
        made = _Sequence(old.length, old.blocks.copy(), ids, old.nodes.copy())
        if self.tails and old.length % self.format.tokens:
            self._give_tails([made])
            made.unrounded = old.unrounded
            for store in self.tails:
                store[:, made.tail] = store[:, old.tail]
        for block in old.blocks:
            self._take(block)
        return self._enter(made)

    def free(self, sequence: int) -> None:
        """Gives a sequence's blocks back.  Ends an open step.  Raises ValueError for an unknown
        sequence, such as one freed before."""
        self._get(sequence)
        self._give_up()
        s = self._sequences.pop(sequence)
        self._drop(s.blocks)
        if s.tail != NOWHERE:
            self._free_tails.append(s.tail)

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets all tokens from ``length`` on.  Ends an open step.  Raises ValueError for an unknown
        sequence, for more tokens than it has, and where the window of the token that would come next
        has been evicted."""
        s = self._get(sequence)
        if not 0 <= length <= s.length:
            raise ValueError(f"length: got {length}, the sequence has {s.length} tokens")
        first = self._first_seen(length) // self.format.tokens
        held = -(-length // self.format.tokens)
        if NOWHERE in s.blocks[first:held]:
            raise ValueError(f"length: got {length}, but the tokens before it have been evicted")
        self._give_up()
        self._drop(s.blocks[held:])
        self._tables = None
        del s.blocks[held:], s.nodes[length // self.format.tokens :]
        if s.ids is not None:
            del s.ids[length:]
        s.length = length
        self._restore_tail(s)

    def _get(self, sequence: int) -> _Sequence:
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):
            raise ValueError(
                f"sequence: {sequence!r} is not in the cache; it was freed, or never added"
            ) from None

    def _enter(self, added: _Sequence) -> int:
        handle, self._next = self._next, self._next + 1
        self._sequences[handle] = added
        return handle

    def _first_seen(self, length: int) -> int:
        """The first token that a query after ``length`` tokens sees."""
        return max(0, length - self.window + 1) if self.window else 0

    # Blocks.

    def _take(self, block: int) -> None:
        if block != NOWHERE:
            self._idle.pop(block, None)
            self._users[block] += 1

    def _drop(self, blocks: list[int]) -> None:
        # The last first: of a beginning that others may share, the end is reused first.
        for block in reversed(blocks):
            if block == NOWHERE:
                continue
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def _allocate(self) -> int:
        """A block without users; there is one."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._unindex(block)
        self._users[block] = 1
        return block

    def _unindex(self, block: int) -> None:
        del self._nodes[self._key_of.pop(block)]

    def _provide(self, blocks: int) -> None:
        """Makes sure that so many are without users, or raises OutOfBlocks."""
        missing = blocks - len(self._free) - len(self._idle)
        if missing <= 0:
            return
        if self.fixed or self.count + missing > MOST_BLOCKS:
            raise OutOfBlocks(
                f"the pool has {self.count} blocks, {self.count - self.used_blocks} of them without "
                f"users; {blocks} more are needed"
            )
        self._grow(_power(self.count + missing))

    def _grow(self, count: int) -> None:
        for i in range(self.layers):
            # Where this raises, the layers before have room that is not counted; nothing else.
            store = self._store(self.format, count)
            store[:, : self.count] = self.pools[i][:, : self.count]
            self.pools[i] = store
        self._free[:0] = range(count - 1, self.count - 1, -1)
        self._users += [0] * (count - self.count)
        self.count = count

    # Tails.

    def _give_tails(self, sequences: list[_Sequence]) -> None:
        """A tail to each that has none."""
        without = [s for s in sequences if s.tail == NOWHERE]
        if len(without) > len(self._free_tails):
            before = min(store.shape[1] for store in self.tails)
            count = _power(before - len(self._free_tails) + len(without))
            for i in range(self.layers):
                store = self._store(self.format.tail, count)
                store[:, :before] = self.tails[i][:, :before]
                self.tails[i] = store
            self._free_tails[:0] = range(count - 1, before - 1, -1)
        for s in without:
            s.tail = self._free_tails.pop()

    def _restore_tail(self, s: _Sequence) -> None:
        """Makes a tail that holds another block of the rounded tokens of the newest, if that is not
        full."""
        newest = s.length // self.format.tokens
        if not self.tails or s.length % self.format.tokens == 0 or s.unrounded == newest:
            return
        self._give_tails([s])
        s.unrounded = newest
        bits = self.format.bits
        for store, pool in zip(self.tails, self.pools):
            block = kv_formats.unpack(self.format, pool[:, s.blocks[-1]])
            both = (
                kv_formats.rotated(self.format, codes, scales, n, torch.float32).bfloat16()
                for codes, scales, n in (
                    (block.keys, block.key_scales, bits[0]),
                    (block.values, block.value_scales, bits[1]),
                )
            )
            store[:, s.tail] = kv_formats.pack(self.format.tail, kv_formats.Block(*both))

    # Steps.

    def _give_up(self) -> None:
        """The open step, if there is one, and the blocks it was given."""
        if self._step is not None:
            for sequence in self._step.sequences:
                s = self._sequences[sequence]
                held = -(-s.length // self.format.tokens)
                if held < len(s.blocks):
                    self._drop(s.blocks[held:])
                    del s.blocks[held:]
                    s.unrounded = NOWHERE  # tokens of another block may have come over it
                    self._restore_tail(s)
            self._step, self._tables = None, None

    def begin_step(self, new: Mapping[int, int]) -> Step:
        """Blocks for ``new[s]`` more tokens, at least one, of each sequence s; the step that
        :meth:`append`, :meth:`attend` and :meth:`commit` take.  One step is open at a time: an older
        one is given up first, its tokens have never been.

        Raises ValueError for an unknown sequence or a count below 1, OutOfBlocks where a pool of
        fixed size has no room for all of them.
        """
        for sequence, count in new.items():
            self._get(sequence)
            if count < 1:
                raise ValueError(
                    f"new: got {count} tokens for sequence {sequence}, at least 1 is needed"
                )
        self._give_up()
        tokens = self.format.tokens
        plan, needed, writers = [], 0, Counter()
        for sequence, count in new.items():
            s = self._sequences[sequence]
            more = -(-(s.length + count) // tokens) - len(s.blocks)
            needed += more
            if s.length % tokens:
                writers[s.blocks[-1]] += 1
            plan.append((s, more))
        # Of a block whose users all write, one keeps it.
        needed += sum(min(count, self._users[block] - 1) for block, count in writers.items())
        self._provide(needed)
        if self.tails:
            self._give_tails([s for s, _ in plan])
        for s, more in plan:
            if s.length % tokens:
                self._own(s)
            if more:
                s.blocks += [self._allocate() for _ in range(more)]
                self._tables = None
        self._step = self._described(new)
        return self._step

    def _own(self, s: _Sequence) -> None:
        """Makes the last block one that may be written to: nobody else's, and not in the index."""
        old = s.blocks[-1]
        if self._users[old] > 1:
            s.blocks[-1] = new = self._allocate()
            self._tables = None
            for pool in self.pools:
                pool[:, new] = pool[:, old]
            self._drop([old])
        elif old in self._key_of:
            self._unindex(old)

    def _described(self, new: Mapping[int, int]) -> Step:
        sequences, counts = tuple(new), tuple(new.values())
        if self._tables is None or self._tables[0] != sequences:
            lists = [self._sequences[s].blocks for s in new]
            most = max(map(len, lists), default=0)
            filled = [blocks + [NOWHERE] * (most - len(blocks)) for blocks in lists]
            self._tables = sequences, self._tensor(filled, torch.int32).view(len(new), most)
        # Numbers in lists: before every token, tensor operations would take several times as long.
        starts = [self._sequences[s].length for s in new]
        ends = [start + count for start, count in zip(starts, counts)]
        rows = [0, *itertools.accumulate(counts)]
        positions = itertools.chain.from_iterable(map(range, starts, ends))
        step = Step(
            sequences,
            counts,
            self._tensor(rows, torch.int64),
            self._tensor(ends, torch.int64),
            self._tables[1],
            self._tensor(list(positions), torch.int64),
            self._tensor([self._sequences[s].tail for s in new], torch.int32) if self.tails else None,
        )
        step.pieces.extend(self._pieces(step))
        return step

    def _tensor(self, numbers: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def _pieces(self, step: Step) -> list[tuple[slice, Step]]:
        """Runs of sequences that stay within a block, and others block by block."""
        tokens, pieces, row, run = self.format.tokens, [], 0, 0
        if not self.tails:
            return [(slice(None), step)]
        first_row = 0  # of the run of sequences from number `run` on
        for i, (s, count) in enumerate(zip(step.sequences, step.counts)):
            start = self._sequences[s].length
            end = start + count
            if start // tokens == (end - 1) // tokens:
                row += count
                continue
            if run < i:
                pieces.append(_part(step, slice(run, i), slice(first_row, row)))
            while start < end:
                stop = min(end, (start // tokens + 1) * tokens)
                here = slice(row, row + stop - start)
                pieces.append(_part(step, slice(i, i + 1), here, stop))
                row, start = here.stop, stop
            run, first_row = i + 1, row
        if run == 0:
            return [(slice(None), step)]
        if run < len(step.sequences):
            pieces.append(_part(step, slice(run, None), slice(first_row, row)))
        return pieces

    def _open(self, step: Step, layer: int = 0) -> None:
        if step is not self._step:
            raise ValueError("step: is not open; it was committed, or the cache has changed since")
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: got {layer}, the cache has {self.layers}")

    def append(self, step: Step, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores keys and values ``[tokens, kv_heads, head_dim]`` (f32, bf16, f16) of the step's new
        tokens in a layer, without attending.  Raises ValueError for a step that is not open or a layer
        that is not there, and what :func:`memlm.ops.kv_append` raises."""
        self._open(step, layer)
        kv_append(self.pools[layer], self._tails(layer), k, v, *self._arguments(step))

    def attend(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        window: int | None = None,
        softcap: float = 0.0,
        slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stores the new tokens' keys and values, as :meth:`append` does; returns their causal
        attention, ``q [tokens, heads, head_dim]``, over what the layer then holds of their sequences:
        :func:`memlm.ops.paged_attention`.  ``window`` is by default the cache's, and at most that; 0
        is none of its own.  Results do not depend on how many tokens a step has, but for the rounding
        of sums.  Raises as :meth:`append` does, and what paged_attention raises."""
        self._open(step, layer)
        if not window or (self.window and window > self.window):
            window = self.window
        rules = (scale, window or 0, softcap, slopes, sinks)
        pool, tails, results = self.pools[layer], self._tails(layer), []
        for rows, piece in step.pieces:
            arguments = self._arguments(piece)
            kv_append(pool, tails, k[rows], v[rows], *arguments)
            results.append(paged_attention(q[rows], pool, tails, *arguments, *rules))
        return results[0] if len(results) == 1 else torch.cat(results)

    def _tails(self, layer: int) -> torch.Tensor | None:
        return self.tails[layer] if self.tails else None

    def _arguments(self, step: Step) -> tuple:
        format = self.format
        return step.rows, step.lengths, step.tables, step.tail_of, format.index, format.tokens

    def commit(self, step: Step, ids: Mapping[int, Sequence[int]] | None = None) -> None:
        """Counts a step's new tokens.  With their token ids, ``ids[s]`` of sequence s, blocks that
        they fill can be shared (:meth:`add`), as long as all tokens of the sequence had ids.  Raises
        ValueError for a step that is not open, and for ids of another number than tokens."""
        self._open(step)
        ids = ids or {}
        for sequence, count in zip(step.sequences, step.counts):
            if sequence in ids and len(ids[sequence]) != count:
                raise ValueError(
                    f"ids: got {len(ids[sequence])} for {count} new tokens of sequence {sequence}"
                )
        self._step = None
        for sequence, count in zip(step.sequences, step.counts):
            s = self._sequences[sequence]
            s.length += count
            if self.tails:
                s.unrounded = (s.length - 1) // self.format.tokens
            if s.ids is not None and sequence in ids:
                s.ids += (int(i) for i in ids[sequence])
                self._index(s)
            else:
                s.ids = None
            self._evict(s)

    def _index(self, s: _Sequence) -> None:
        """Enters the blocks that have become full."""
        tokens = self.format.tokens
        while len(s.nodes) < s.length // tokens:
            i = len(s.nodes)
            key = (s.nodes[-1] if s.nodes else 0, tuple(s.ids[i * tokens : (i + 1) * tokens]))
            if key not in self._nodes:
                self._nodes[key] = (self._next_node, s.blocks[i])
                self._key_of[s.blocks[i]] = key
                self._next_node += 1
            s.nodes.append(self._nodes[key][0])

    def _evict(self, s: _Sequence) -> None:
        i = self._first_seen(s.length) // self.format.tokens - 1
        while i >= 0 and s.blocks[i] != NOWHERE:
            self._drop([s.blocks[i]])
            s.blocks[i], self._tables = NOWHERE, None
            i -= 1

    # Reading.

    def read(
        self, sequence: int, layer: int, dtype: torch.dtype = torch.float32, step: Step | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[kv_heads, length, head_dim]`` of a sequence, dequantised; zeros where
        they have been evicted.  With the open ``step``, its tokens are among them.  Raises ValueError
        for an unknown sequence or layer, and a step that is not open."""
        s = self._get(sequence)
        if step is not None:
            self._open(step)
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: got {layer}, the cache has {self.layers}")
        length = s.length
        if step is not None and sequence in step.sequences:
            length += step.counts[step.sequences.index(sequence)]
        held = -(-length // self.format.tokens)
        first = s.blocks[:held].count(NOWHERE)
        blocks = torch.tensor(s.blocks[first:held], dtype=torch.int64, device=self.device)
        read = []
        for x in kv_formats.read(self.format, self.pools[layer][:, blocks], dtype):
            whole = x.new_zeros(self.kv_heads, length, self.format.dim)
            start = first * self.format.tokens
            whole[:, start:] = x.flatten(1, 2)[:, : length - start]
            read.append(whole)
        return read[0], read[1]


def _power(blocks: int) -> int:
    """The least power of two that is no less; 0 for 0."""
    return 1 << (blocks - 1).bit_length() if blocks else 0


def _part(step: Step, which: slice, rows: slice, stop: int | None = None) -> tuple[slice, Step]:
    """Some sequences of a step, with the new tokens ``rows`` of them; ``stop``: the tokens of a single
    one after them."""
    counts, lengths = step.counts[which], step.lengths[which]
    if stop is not None:
        counts, lengths = (rows.stop - rows.start,), torch.full_like(lengths, stop)
    starts = torch.tensor([0, *counts], device=step.rows.device).cumsum(0)
    parts = (starts, lengths, step.tables[which], step.positions[rows], step.tail_of[which])
    return rows, Step(step.sequences[which], counts, *parts)
