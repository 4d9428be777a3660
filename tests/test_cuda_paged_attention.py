"""paged_attention on the emulated GPU, csrc/cuda/paged_attention.cu, against f64 over what the blocks
hold."""

import pytest
import torch

from memlm import kv_formats
from memlm.kv_formats import TYPES
from memlm.ops.paged_attention import stored

from . import cuda_kv
from .attention_numerics import exact
from .emulator import emulator
from .numerics import ROUNDOFF, SMALLEST, assert_within
from .paged import Paged, paged
from .test_attention import slopes_of
from .test_paged_attention import LENGTHS, NEW, random_queries

types = pytest.mark.parametrize("type", TYPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
F32 = torch.float32


def run(made: Paged, q, new, scale=None, window=0, softcap=0.0, slopes=None, sinks=None, **kwargs):
    scale = q.shape[2] ** -0.5 if scale is None else scale
    rules = (scale, window, softcap, slopes, sinks)
    return cuda_kv.paged_attention(q, made.pool, made.tails, *made.step(new), *rules, **kwargs)


def parts_off(type: str, dtype: torch.dtype, arch: int):
    """Of products of floats, relative errors of scores' terms, of weights, of values, and what of a weight is
    lost below f16's least number."""
    exact_queries = type in ("f32", "bf16") and dtype == (torch.bfloat16 if arch >= 800 else torch.float16)
    unit = ROUNDOFF[torch.bfloat16 if arch >= 800 else torch.float16]
    two = 2 * unit**2  # as a sum of two
    scores = (0 if exact_queries else two) + (two if type == "f32" else 0)
    lost = 0 if arch >= 800 else 2.0**-25
    return scores + lost, (two if dtype == torch.float16 else unit), two if type == "f32" else 0, lost


# What the kernel's head says of its integers: half a step, of 1 / 32,639 of the largest, and its f32 rounding.
HALF_STEP = 0.5 / 32639 + 2 * ROUNDOFF[F32]
STAGE = 64  # tokens whose weights have a step


def digits_off(made: Paged, table, p: torch.Tensor, group: int) -> torch.Tensor:
    """[1, H, n, channels]: how far off sums are of weights ``p`` [1, H, n, length] as integers, where they are
    not 0: by half a step for each token, of the largest weight times scale in its stage, times its code."""
    format, length = made.format, p.shape[-1]
    parts = kv_formats.unpack(format, made.pool[:, table[: -(-length // format.tokens)].long()])
    scales = parts.value_scales.double().abs().flatten(1, 2)[:, :length]  # [kv_heads, length, groups]
    codes = (parts.values.double().flatten(1, 2)[:, :length] - kv_formats.ZEROS[format.bits[1]]).abs()
    off = []
    for of in range(format.groups):
        weights = p[0] * scales[..., of].repeat_interleave(group, 0)[:, None]
        stages = torch.nn.functional.pad(weights, (0, -length % STAGE)).unflatten(-1, (-1, STAGE))
        largest = stages.amax(-1, keepdim=True).expand_as(stages).flatten(-2)[..., :length]
        its = codes[..., of * format.group : (of + 1) * format.group].repeat_interleave(group, 0)
        off.append(HALF_STEP * (largest * (p[0] > 0)) @ its)
    return torch.cat(off, -1)[None]


def check(
    made: Paged, q, new, window=0, scale=None, sinks=None, arch=800, run=run, parts_off=parts_off,
    digits=True, **rules
):  # fmt: skip
    """A result within its bounds, of ``digits`` (int8, and int4 but its tail) or of products of floats; returns
    the share of elements that a zero would fail."""
    format, group = made.format, q.shape[1] // made.pool.shape[0]
    scale = format.dim**-0.5 if scale is None else scale
    options = {key: rules.pop(key) for key in ("longest", "spare") if key in rules}
    got = run(made, q, new, scale=scale, window=window, sinks=sinks, arch=arch, **rules, **options)
    assert got.dtype == q.dtype and got.shape == q.shape
    telling, row = 0, 0
    x = q.double() * scale
    if format.quantized:
        x = kv_formats.hadamard(torch.nn.functional.pad(x, (0, format.width - format.dim)))
        if format.tail:  # twice, as keys have them: rounded and not
            x = torch.cat((x, x), dim=-1)
    off_scores, off_weights, off_values, lost = parts_off(format.type, q.dtype, arch)
    digits = digits and format.quantized
    rules |= {"scale": 1.0, "right": 0, "left": window - 1, "to_end": True}
    for i, (table, length, count) in enumerate(zip(made.tables, made.lengths, new)):
        here = slice(row, row + count)
        row += count
        if count == 0:
            continue
        tail = None if made.tail_of is None else made.tail_of[i]
        keys, values = (
            t[None] for t in stored(format, made.pool, made.tails, table, tail, 0, length, F32)
        )
        ours = x[here].transpose(0, 1)[None].float()
        wanted = exact(ours, keys, values, sinks=sinks, **rules)
        each = torch.eye(length).expand(*keys.shape[:2], -1, -1)
        p = exact(ours, keys, each, sinks=sinks, **rules).value["out"]  # [1, H, n, length]
        wide_keys, wide_values = (t.double().abs().repeat_interleave(group, 1) for t in (keys, values))
        of_floats, of_digits = p, torch.zeros_like(p)  # tokens that are multiplied as such
        if digits:
            newest = (length - 1) // format.tokens * format.tokens if format.tail else length
            of_floats = p * (torch.arange(length) >= newest)
            of_digits = p - of_floats
        off_p = of_floats * off_scores * (ours.double().abs() @ wide_keys.mT)
        largest = ours.double().abs().amax(-1, keepdim=True)
        off_p = off_p + of_digits * HALF_STEP * largest * wide_keys.sum(-1)[..., None, :]
        size = p @ wide_values
        off = off_p @ wide_values + off_p.sum(-1, keepdim=True) * size
        off = off + (off_weights + off_values) * (of_floats @ wide_values)
        if digits:
            off = off + digits_off(made, table, of_digits, group)
        seen = (of_floats > 0).double()
        off = off + lost * (127 if format.quantized else 1) * (seen @ (wide_values + 1))
        out, bound = (t.transpose(1, 2)[0] for t in (wanted.value["out"], wanted.bound["out"] + off))
        if format.quantized:
            piece = format.width & -format.width
            # A transform adds up `piece` errors, over sqrt(piece), and rounds once for each halving.
            pieces = (bound + 8 * ROUNDOFF[F32] * out.abs()).unflatten(-1, (-1, piece))
            bound = (pieces.sum(-1, keepdim=True) / piece**0.5).expand_as(pieces).flatten(-2)
            out = kv_formats.hadamard(out)
        out, bound = out[..., : format.dim], bound[..., : format.dim]
        bound = bound + ROUNDOFF[q.dtype] * (out.abs() + bound) + SMALLEST[q.dtype]
        assert_within(got[here], out, bound)
        telling += int((out.abs() > bound).sum())
    return telling / max(1, got.numel())


@types
def test_heads_and_sizes(type):
    for turn, (dim, kv_heads, group) in enumerate([(64, 2, 1), (80, 1, 4)]):
        dtype = (torch.float16, torch.bfloat16)[turn % 2]
        made = paged(type, dim, LENGTHS[:5], kv_heads, (32, 96)[turn % 2], dtype)
        assert check(made, random_queries(NEW[:5], kv_heads * group, dim, dtype), NEW[:5]) > 0.8


@types
@dtypes
@pytest.mark.gpu_proof
def test_every_head_and_size(type, dtype):
    for turn, (dim, kv_heads, group) in enumerate(
        [
            (64, 2, 1), (80, 1, 4), (96, 3, 3), (128, 2, 8), (33, 1, 2), (256, 1, 5), (1, 2, 7), (32, 1, 6),
            (64, 1, 40),
        ]
    ):  # fmt: skip
        made = paged(type, dim, LENGTHS, kv_heads, (32, 64, 96)[turn % 3], dtype)
        q = random_queries(NEW, kv_heads * group, dim, dtype)
        assert check(made, q, NEW, spare=turn) > 0.8


@types
def test_turing(type):
    made = paged(type, 64, [70, 33], 1, dtype=torch.float16)
    assert check(made, random_queries([1, 4], 3, 64, torch.float16), [1, 4], arch=750) > 0.8


@types
@pytest.mark.parametrize("window", [33, 65])
def test_windows(type, window):
    lengths, new = LENGTHS[4:7], NEW[4:7]
    made, whole = paged(type, 64, lengths), paged(type, 64, lengths)
    # Blocks that no query sees are gone.
    for table, length, count in zip(made.tables, made.lengths, new):
        first = max(0, length - count - window + 1)
        table[: first // 64] = -1 if window % 2 else 10**6
    q = random_queries(new, 4, 64, torch.bfloat16)
    assert torch.equal(run(made, q, new, window=window), run(whole, q, new, window=window))
    check(whole, q, new, window=window)


@types
def test_options(type):
    made, q = paged(type, 64, [5, 130], 1), random_queries([1, 3], 3, 64, torch.float16)
    sinks = torch.linspace(-2, 4, 3)
    for options in (
        {"softcap": 3.0}, {"slopes": slopes_of(3)}, {"sinks": sinks}, {"scale": 0.5}, {"scale": 0.0},
        {"softcap": 3.0, "slopes": slopes_of(3), "sinks": sinks, "window": 50},
    ):  # fmt: skip
        check(made, q, [1, 3], **options)


@types
@dtypes
def test_long(type, dtype):
    """Lengths that blocks share out, beside a sequence with more new tokens, which they do not."""
    lengths = [700, 60, 300]
    made, sinks = paged(type, 64, lengths, 1, dtype=dtype), torch.tensor([0.5, 2.0, -1.0])
    for new in ([1, 1, 2], [3, 30, 0]):
        check(made, random_queries(new, 3, 64, dtype), new, sinks=sinks, window=600)


@types
def test_independent_of_what_else_is_in_the_step(type):
    """A sequence's result is the same alone, and with any rows that the host thinks of."""
    lengths, new = [1, 65, 600, 130], [1, 2, 1, 67]
    made = paged(type, 64, lengths, 1)
    q, row = random_queries(new, 2, 64, torch.float16), 0
    together = run(made, q, new, spare=100)
    for i, (length, count) in enumerate(zip(lengths, new)):
        here = slice(row, row + count)
        assert torch.equal(run(made.part(i, length), q[here], [count]), together[here])
        row += count


def check_extreme_scores(type: str, run, append, length: int, kv_heads: int) -> None:
    """Of ``run(made, q, new)``.  One key wins: its value comes out, as ``append`` has stored it."""
    made, q = paged(type, 64, [length], kv_heads), random_queries([3], 2 * kv_heads, 64)
    for size in (1e4, 1e-30):
        assert run(made, (q * size).bfloat16(), [3]).isfinite().all()
    k, v = torch.zeros(length, kv_heads, 64), torch.randn(length, kv_heads, 64)
    k[length // 2] = 1.0
    append(made.pool, made.tails, k.half(), v.half(), *made.step([length]))
    out = run(made, torch.full((1, kv_heads, 64), 1e4).half(), [1])
    tail = None if made.tail_of is None else made.tail_of[0]
    value = stored(made.format, made.pool, made.tails, made.tables[0], tail, 0, length, F32)[1][:, length // 2]
    if made.format.quantized:
        value = kv_formats.hadamard(value)
    torch.testing.assert_close(out[0].float(), value[:, :64], rtol=2**-10, atol=2**-10)


@types
def test_extreme_scores(type):
    check_extreme_scores(type, run, cuda_kv.kv_append, 130, 2)


def test_reads_the_cache_once():
    """Of decoding: all query heads of a key-value head take it from one reading, in whole sectors."""
    for type in TYPES[1:]:
        made = paged(type, 128, [256], 1, dtype=torch.float16)
        q = random_queries([1], 8, 128, torch.float16)
        counts = emulator().counts(lambda: run(made, q, [1]))
        # The blocks, and a little: q, its sequence's numbers, again by each thread that wants them.
        stored_bytes = 4 * made.format.block_bytes
        if made.format.tail:
            stored_bytes += made.format.tail.block_bytes - made.format.block_bytes
        assert counts.distinct_read * 32 <= 1.05 * stored_bytes + 4096
        assert counts.read_sectors <= 1.1 * counts.distinct_read + 700


@types
def test_no_tokens(type):
    for lengths, new in (([], []), ([5, 70], [0, 0])):
        made = paged(type, 64, lengths)
        assert run(made, random_queries(new, 4, 64, torch.float16), new).shape == (0, 4, 64)


def test_queries_that_lie_apart():
    made = paged("int8", 64, [50])
    q = torch.randn(50, 8, 64).half()[:, :4]
    assert torch.equal(run(made, q, [50]), run(made, q.contiguous(), [50]))


def test_bad_input():
    made, q = paged("int8", 64, [40, 3]), random_queries([2, 1], 4, 64, torch.float16)
    for match, changes in [
        ("dtype: got f32", {"q": q.float()}),
        ("heads: got 3", {"q": q[:, :3]}),
        ("scale: got nan", {"scale": float("nan")}),
        ("window: got -1", {"window": -1}),
        ("softcap: got -1", {"softcap": -1.0}),
        ("bounds: got longest = -1", {"longest": -1}),
        ("sequences: got room for 2147483648 tokens", {"longest": 2**31}),
        ("head_dim = 300, accepted is 1 to 256", {"q": torch.zeros(3, 4, 300).half()}),
    ]:
        with pytest.raises(RuntimeError, match=match):
            run(made, changes.pop("q", q), [2, 1], **changes)
    with pytest.raises(RuntimeError, match="head_dim = 256 needs [0-9]+ bytes of shared memory"):
        run(paged("f32", 256, [3]), torch.zeros(1, 2, 256).half(), [1], arch=750)
