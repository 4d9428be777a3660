"""paged_attention: every implementation on every instruction set against f64 over what the blocks
hold, every type, and what results may not depend on."""

import pytest
import torch

from memlm import kv_formats
from memlm.kv_formats import TYPES
from memlm.ops import paged_attention
from memlm.ops._registry import implementations
from memlm.ops.paged_attention import queries, stored

from .attention_numerics import exact
from .numerics import ROUNDOFF, SMALLEST, assert_within
from .paged import Paged, paged
from .test_attention import F32, slopes_of

# Around blocks of 64: decoding, prefill from nothing, chunks that continue, a sequence that waits.
LENGTHS = [1, 64, 63, 65, 130, 200, 70, 5]
NEW = [1, 1, 63, 2, 1, 67, 0, 5]
types = pytest.mark.parametrize("type", TYPES)


def random_queries(new, heads, dim, dtype=F32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(new), heads, dim, generator=generator).to(dtype)


def run(implementation, made: Paged, q, new, scale=None, window=0, softcap=0.0, slopes=None, sinks=None):
    scale = q.shape[2] ** -0.5 if scale is None else scale
    rules = (scale, window, softcap, slopes, sinks)
    op = implementations("paged_attention")[implementation]
    return op(q, made.pool, made.tails, *made.step(new), *rules)


def rounded_weights(format, table, pool, keys, q, group, rules) -> torch.Tensor:
    """Variance [rows, heads, dim] of what rounding softmax weights to int8 adds, of q [1, H, n, width]:
    each weight times a value's scale is off by up to half a step of 1/127 of the largest in its block,
    for each group of channels."""
    n, length, tokens = q.shape[2], keys.shape[2], format.tokens
    parts = kv_formats.unpack(format, pool[:, table[: -(-length // tokens)].long()])
    steps = parts.value_scales.double().abs().flatten(1, 2)[:, :length]  # [kv_heads, keys, groups]
    if format.tail:  # multiplied as it is
        steps[:, (length - 1) // tokens * tokens :] = 0
    values = parts.values.double().flatten(1, 2)[:, :length] - kv_formats.ZEROS[format.bits[1]]
    each = torch.eye(length).expand(*keys.shape[:2], -1, -1)
    p = exact(q, keys, each, **rules).value["out"][0]  # the weights themselves: [H, n, keys]
    variance = torch.zeros(q.shape[1], n, format.dim, dtype=torch.float64)
    for g in range(format.groups):
        weighted = p * steps[..., g].repeat_interleave(group, 0)[:, None]
        blocks = torch.nn.functional.pad(weighted, (0, -length % tokens)).unflatten(-1, (-1, tokens))
        step = (blocks.amax(-1, keepdim=True) / 127).expand_as(blocks).flatten(-2)[..., :length]
        alone = torch.zeros_like(values)
        span = slice(g * format.group, (g + 1) * format.group)
        alone[..., span] = values[..., span]
        reach = kv_formats.hadamard(alone)[..., : format.dim].repeat_interleave(group, 0)
        variance += (step.square() / 12) @ reach.square()
    return variance.transpose(0, 1)


def check(path, made: Paged, q, new, window=0, scale=None, sinks=None, **rules):
    """A result within its bounds; returns how many elements a zero would fail."""
    format, group = made.format, q.shape[1] // made.pool.shape[0]
    scale = format.dim**-0.5 if scale is None else scale
    got = run(path, made, q, new, scale=scale, window=window, sinks=sinks, **rules)
    assert got.dtype == q.dtype and got.shape == q.shape
    telling, row = 0, 0
    x = queries(format, q, scale, torch.float64)
    rules |= {"scale": 1.0, "right": 0, "left": window - 1, "to_end": True}
    for i, (table, length, count) in enumerate(zip(made.tables, made.lengths, new)):
        here = slice(row, row + count)
        row += count
        if count == 0:
            continue
        tail = None if made.tail_of is None else made.tail_of[i]
        parts = stored(format, made.pool, made.tails, table, tail, 0, length, F32)
        keys, values = (t[None] for t in parts)
        queries_here = x[here].transpose(0, 1)[None].float()
        wanted = exact(queries_here, keys, values, sinks=sinks, **rules)
        out, bound = (t["out"][0].transpose(0, 1) for t in (wanted.value, wanted.bound))
        if format.quantized:
            size = format.width & -format.width
            # A transform adds up `size` errors, over sqrt(size), and rounds once for each halving.
            pieces = (bound + 8 * ROUNDOFF[F32] * out.abs()).unflatten(-1, (-1, size))
            bound = (pieces.sum(-1, keepdim=True) / size**0.5).expand_as(pieces).flatten(-2)
            out, bound = kv_formats.hadamard(out)[..., : format.dim], bound[..., : format.dim]
            if path == "cpp":
                variance = rounded_weights(
                    format, table, made.pool, keys, queries_here, group, {**rules, "sinks": sinks}
                )
                bound = bound + 7 * variance.sqrt()  # of some hundred independent roundings
        else:
            out, bound = out[..., : format.dim], bound[..., : format.dim]
        bound = bound + ROUNDOFF[q.dtype] * (out.abs() + bound) + SMALLEST[q.dtype]
        assert_within(got[here], out, bound)
        telling += int((out.abs() > bound).sum())
    return telling / max(1, got.numel())


@types
def test_heads_and_sizes(path, type):
    for turn, (dim, kv_heads, group) in enumerate(
        [(64, 2, 1), (80, 1, 4), (96, 3, 3), (128, 2, 8), (33, 1, 2), (256, 1, 5), (1, 2, 7), (32, 1, 6)]
    ):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
        made = paged(type, dim, LENGTHS, kv_heads, (32, 64, 96)[turn % 3], dtype)
        q = random_queries(NEW, kv_heads * group, dim, dtype)
        assert check(path, made, q, NEW) > 0.8  # zeros would be outside


@types
@pytest.mark.parametrize("window", [1, 2, 33, 64, 65, 1000])
def test_windows(path, type, window):
    made = paged(type, 64, LENGTHS)
    # Blocks that no query sees are gone.
    for table, length, count in zip(made.tables, made.lengths, NEW):
        first = max(0, length - count - window + 1)
        table[: first // 64] = -1 if window % 2 else 10**6
    whole = paged(type, 64, LENGTHS)
    q = random_queries(NEW, 4, 64)
    assert torch.equal(run(path, made, q, NEW, window=window), run(path, whole, q, NEW, window=window))
    check(path, whole, q, NEW, window=window)


@types
def test_options(path, type):
    made, q = paged(type, 64, LENGTHS, 2), random_queries(NEW, 6, 64)
    sinks = torch.linspace(-2, 4, 6)
    for options in (
        {"softcap": 3.0}, {"slopes": slopes_of(6)}, {"sinks": sinks}, {"scale": 0.5}, {"scale": 0.0},
        {"softcap": 3.0, "slopes": slopes_of(6), "sinks": sinks, "window": 50},
    ):  # fmt: skip
        check(path, made, q, NEW, **options)


@types
def test_long(path, type):
    """More than one thread's share of the keys, many blocks."""
    made = paged(type, 64, [3000], 1)
    for new in (1, 3):
        check(path, made, random_queries([new], 3, 64), [new])


@types
def test_extreme_scores(path, type):
    made, q = paged(type, 64, [130]), random_queries([3], 4, 64)
    for size in (1e4, 1e-30):
        out = run(path, made, q * size, [3])
        assert out.isfinite().all()
    # One key wins: its value comes out, as it is stored.
    made.pool.fill_(255)
    k, v = torch.zeros(130, 2, 64), torch.randn(130, 2, 64)
    k[77] = 1.0
    append = implementations("kv_append")["cpp"]
    append(made.pool, made.tails, k, v, *made.step([130]))
    out = run(path, made, torch.full((1, 2, 64), 1e4), [1])
    tail = None if made.tail_of is None else made.tail_of[0]
    parts = (made.format, made.pool, made.tails, made.tables[0], tail)
    value = stored(*parts, 0, 130, torch.float32)[1][:, 77]
    if made.format.quantized:
        value = kv_formats.hadamard(value)
    torch.testing.assert_close(out[0], value[:, :64], rtol=1e-5, atol=1e-5)


@types
def test_no_tokens(path, type):
    for lengths, new in (([], []), ([5, 70], [0, 0])):
        made = paged(type, 64, lengths)
        assert run(path, made, random_queries(new, 4, 64), new).shape == (0, 4, 64)


@types
def test_independent_of_threads(type, restore_threads):
    made, results = paged(type, 80, [*LENGTHS, 3000]), []
    new = [*NEW, 1]
    q = random_queries(new, 4, 80)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run("cpp", made, q, new))
    assert all(torch.equal(results[0], other) for other in results[1:])


@types
def test_independent_of_what_else_is_in_the_step(type):
    """A sequence's result is the same alone, and its table's numbers do not matter."""
    made = paged(type, 64, LENGTHS)
    q = random_queries(NEW, 4, 64)
    together, row = run("cpp", made, q, NEW), 0
    for i, (length, count) in enumerate(zip(LENGTHS, NEW)):
        alone = made.part(i, length)
        here = slice(row, row + count)
        assert torch.equal(run("cpp", alone, q[here], [count]), together[here])
        row += count
    moved = paged(type, 64, LENGTHS)
    order = torch.randperm(moved.pool.shape[1], generator=torch.Generator().manual_seed(5))
    moved.pool = moved.pool[:, order.argsort()].contiguous()
    moved.tables = torch.where(moved.tables < 0, -1, order[moved.tables.long().clamp(0)].int())
    assert torch.equal(run("cpp", moved, q, NEW), together)


@types
def test_chunks_and_block_sizes_within_bounds(type):
    """Prefill at once, in chunks, token by token, in blocks of any size: each within its bounds, and
    the stored tokens, so what is bounded, are the same."""
    for tokens in (32, 64, 256):
        whole = paged(type, 64, [150], tokens=tokens)
        q = random_queries([150], 4, 64)
        for chunk in (1, 40, 150):
            for start in range(0, 150, chunk) if chunk > 1 else (0, 63, 64, 149):
                end = min(150, start + chunk)
                part = whole.part(0, end)
                if part.tails is not None:  # as it was then
                    part.tails = paged(type, 64, [end], tokens=tokens).tails
                check("cpp", part, q[start:end], [end - start])


def test_queries_that_lie_apart():
    made = paged("int8", 64, [50])
    qkv = torch.randn(50, 8, 64)
    q = qkv[:, :4]
    assert torch.equal(run("cpp", made, q, [50]), run("cpp", made, q.contiguous(), [50]))


@types
def test_torch(type):
    made, q = paged(type, 64, [40, 3]), random_queries([2, 1], 4, 64)
    args = (q, made.pool, made.tails, *made.step([2, 1]), 0.125, 0, 0.0, slopes_of(4), None)
    torch.library.opcheck(torch.ops.memlm.paged_attention.default, args)
    compiled = torch.compile(lambda q: paged_attention(q, *args[1:]), fullgraph=True)
    assert torch.equal(compiled(q), paged_attention(*args))


def test_bad_input():
    made, q = paged("int8", 64, [40, 3]), random_queries([2, 1], 4, 64)
    rows, lengths, tables = made.step([2, 1])[:3]
    good = {
        "q": q, "pool": made.pool, "tails": None, "tail_of": None, "rows": rows, "lengths": lengths,
        "tables": tables, "type": 2, "block_tokens": 64,
    }  # fmt: skip
    for error, match, wrong in [
        (TypeError, "q: got torch.float64", {"q": q.double()}),
        (ValueError, "q: got shape", {"q": q[0]}),
        (ValueError, "q: got 3 heads", {"q": q[:, :3]}),
        (ValueError, "pool: got shape", {"type": 1}),
        (ValueError, "tails: int4 has tails", {"type": 3}),
        (ValueError, "rows: got", {"rows": rows[:-1]}),
        (ValueError, "tables: got", {"tables": torch.full_like(tables, -1)}),
        (ValueError, "scale: got nan", {"scale": float("nan")}),
        (ValueError, "window: got -1", {"window": -1}),
        (ValueError, "softcap: got -1", {"softcap": -1.0}),
        (ValueError, "slopes: got", {"slopes": slopes_of(3)}),
        (ValueError, "sinks: got torch.float64", {"sinks": slopes_of(4).double()}),
    ]:
        with pytest.raises(error, match=match):
            paged_attention(**{**good, **wrong})
