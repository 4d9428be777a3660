"""attention: every implementation on every instruction set against f64, forward and backward, and
as a torch op and a function."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memlm.ops import attention, attention_varlen
from memlm.ops._registry import implementations
from memlm.ops.attention import dropout_factors

from .attention_numerics import exact
from .numerics import assert_within
from .test_packaging import ROOT

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, BF16, F16]
INF = math.inf
# Around the tiles: rows of 4, 6, 12; 16 keys; blocks of 64, 96, 192 rows and of 128 keys.
LENGTHS = [0, 1, 2, 5, 13, 16, 17, 33, 97, 127, 128, 129, 200, 260]
HEADS = [(1, 1), (4, 4), (4, 2), (3, 1), (6, 2)]
DIMS = [32, 64, 80, 96, 128, 256, 40, 72, 1, 7]


def random_case(batch, heads, q_len, k_len, dim, v_dim=None, dtype=F32, seed=0, size=1.0):
    """q, k, v and a gradient; heads: of queries, of keys."""
    generator = torch.Generator().manual_seed(seed)
    v_dim = v_dim or dim
    shapes = [
        (batch, heads[0], q_len, dim), (batch, heads[1], k_len, dim),
        (batch, heads[1], k_len, v_dim), (batch, heads[0], q_len, v_dim),
    ]  # fmt: skip
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(dtype) for x in (q * size, k, v, grad)]


def run(implementation, q, k, v, grad=None, mask=None, offsets=(None, None), **options):
    """Results by name, of the ops themselves; ``implementation``: its name, or both callables."""
    if isinstance(implementation, str):
        both = ("attention", "attention_backward")
        implementation = [implementations(name)[implementation] for name in both]
    forward, backward = implementation
    o = {"scale": q.shape[-1] ** -0.5, "left": -1, "right": -1, "to_end": False, "softcap": 0.0}
    o |= {"slopes": None, "sinks": None, "dropout": 0.0, "seed": None}
    o |= {"block_mask": None, "mask_block": 128} | options
    seed = None if o["seed"] is None else torch.tensor(o["seed"])
    rules = [o["scale"], o["left"], o["right"], o["to_end"], o["softcap"], o["slopes"], o["sinks"]]
    rest = (mask, o["block_mask"], o["mask_block"], *offsets, *rules, o["dropout"], seed)
    out, lse = forward(q, k, v, *rest)
    results = {"out": out, "lse": lse}
    if grad is not None:
        want = mask is not None and mask.is_floating_point()
        dq, dk, dv, dmask, dsinks = backward(grad, q, k, v, out, lse, *rest, want)
        results |= {"q": dq, "k": dk, "v": dv}
        if want:
            results["mask"] = dmask.sum_to_size(mask.shape).to(mask.dtype)
        if o["sinks"] is not None:
            results["sinks"] = dsinks
    return results


def check(implementation, q, k, v, grad, mask=None, **options):
    """All results within their bounds; returns the exact ones."""
    options = {"scale": q.shape[-1] ** -0.5} | options
    got = run(implementation, q, k, v, grad, mask, **options)
    wanted = exact(q, k, v, mask, grad, **options)
    assert set(got) == set(wanted.value)
    for name, result in got.items():
        assert result.shape == wanted.value[name].shape
        assert result.dtype == (F32 if name in ("lse", "sinks") else q.dtype)
        if name == "lse":
            nothing = wanted.value[name] == -INF
            assert torch.equal(result == -INF, nothing)
            result = result.masked_fill(nothing, 0)
            wanted.value[name] = wanted.value[name].masked_fill(nothing, 0)
        assert_within(result, wanted.value[name], wanted.bound[name])
    return wanted


def slopes_of(heads):
    return 2.0 ** -torch.arange(1.0, heads + 1)


def float_mask(shape, dtype, seed=0):
    """Of order 1, a fifth of it -inf."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randn(shape, generator=generator)
    return mask.masked_fill(torch.rand(shape, generator=generator) < 0.2, -INF).to(dtype)


def bool_mask(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes_and_groups(path, dtype):
    for turn, (dim, heads) in enumerate(zip(DIMS, itertools.cycle(HEADS))):
        case = random_case(2, heads, 70, 150, dim, dtype=dtype)
        wanted = check(path, *case, right=0, to_end=bool(turn % 2))
        for name in ("out", "q", "k", "v"):  # zeros would be far outside
            zero = wanted.value[name].abs() <= wanted.bound[name]
            assert zero.double().mean() < (0.6 if name in "kv" else 0.2)
    check(path, *random_case(1, (2, 1), 20, 30, 24, 56, dtype=dtype))
    check(path, *random_case(1, (2, 1), 20, 30, 512, 3, dtype=dtype))


def test_lengths(path):
    for q_len, k_len in itertools.product(LENGTHS, LENGTHS):
        if (q_len * 7 + k_len) % 3 == 0 or min(q_len, k_len) < 2 or q_len == k_len:
            rules = [{}, {"right": 0}, {"right": 0, "to_end": True}][(q_len + k_len) % 3]
            check(path, *random_case(1, (2, 1), q_len, k_len, 24), **rules)


def test_long(path):
    """Several blocks of rows and of keys, and passages cut in parts."""
    check(path, *random_case(1, (2, 1), 700, 900, 16), right=0, to_end=True)
    check(path, *random_case(1, (1, 1), 1, 3000, 16))
    check(path, *random_case(1, (1, 1), 3000, 2, 16))
    check(path, *random_case(3, (3, 3), 300, 400, 16), left=100, right=30)


@st.composite
def cases(draw):
    heads = draw(st.sampled_from(HEADS))
    dtype = draw(st.sampled_from(DTYPES))
    batch, q_len, k_len = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 150)),
    )
    dim, v_dim = draw(st.sampled_from([5, 16, 40])), draw(st.sampled_from([3, 16, 40]))
    case = random_case(batch, heads, q_len, k_len, dim, v_dim, dtype, draw(st.integers(0, 5)))
    options = {}
    limit = st.one_of(st.just(-1), st.just(0), st.integers(0, 60))
    options["left"], options["right"] = draw(limit), draw(limit)
    options["to_end"] = draw(st.booleans())
    options["softcap"] = draw(st.sampled_from([0.0, 0.5, 20.0]))
    options["scale"] = draw(st.sampled_from([0.3, 1.0, -0.5]))
    mask = None
    if kind := draw(st.sampled_from(["", "bool", "float"])):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads[0], q_len, k_len)]
        mask = bool_mask(shape) if kind == "bool" else float_mask(shape, dtype)
    if draw(st.booleans()):
        options["slopes"] = slopes_of(heads[0])
    if draw(st.booleans()):
        options["sinks"] = torch.linspace(-2, 3, heads[0])
    if draw(st.booleans()):
        options["dropout"], options["seed"] = (
            draw(st.sampled_from([0.1, 0.7])),
            draw(st.integers(0, 2**62)),
        )
    return case, mask, options


@settings(
    max_examples=80, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(cases())
def test_every_combination_of_options(path, given_case):
    case, mask, options = given_case
    check(path, *case, mask, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_every_shape(path, dtype):
    sizes = (2, 4, 19, 33)
    case = random_case(2, (4, 2), 19, 33, 24, dtype=dtype)
    for sized in itertools.product([False, True], repeat=4):
        shape = [n if whole else 1 for n, whole in zip(sizes, sized)]
        check(path, *case, bool_mask(shape))
        check(path, *case, float_mask(shape, dtype))
    turned = float_mask(sizes[::-1], dtype).permute(3, 2, 1, 0)  # its last dimension is not dense
    check(path, *case, turned)
    check(path, *case, bool_mask(sizes[::-1]).permute(3, 2, 1, 0))


def test_rows_that_see_nothing(path):
    q, k, v, grad = random_case(2, (2, 1), 30, 40, 24)
    mask = bool_mask((2, 2, 30, 40))
    mask[0, 1, 3:9] = False
    nowhere = torch.full((1, 1, 30, 40), -INF)
    sinks = torch.tensor([0.5, -3.0])
    for given_mask, rules, empty in (
        (mask, {}, slice(3, 9)),
        (nowhere, {}, slice(None)),
        (None, {"left": 0, "right": 0, "to_end": True}, slice(0, 0)),
        (None, {"right": 0, "to_end": True}, slice(0, 0)),
    ):
        for more in ({}, {"sinks": sinks}):
            check(path, q, k, v, grad, given_mask, **rules, **more)
            got = run(path, q, k, v, grad, given_mask, **rules, **more)
            assert torch.equal(got["out"][0, 1, empty], torch.zeros_like(got["out"][0, 1, empty]))
            assert torch.equal(got["q"][0, 1, empty], torch.zeros_like(got["q"][0, 1, empty]))
            lse = got["lse"][0, 1, empty]
            assert torch.equal(lse, torch.full_like(lse, more["sinks"][1] if more else -INF))
    # More queries than keys: the first stand before all keys.
    q, k, v, grad = random_case(1, (2, 2), 30, 10, 24)
    check(path, q, k, v, grad, right=0, to_end=True)
    assert run(path, q, k, v, right=0, to_end=True)["out"][:, :, :20].abs().max() == 0


def test_extreme_scores(path):
    q, k, v, grad = random_case(1, (2, 2), 40, 150, 32)
    for scale in (1e4, -1e4, 1e-30, 0.0):
        check(
            path,
            q / q.norm(dim=-1, keepdim=True),
            k / k.norm(dim=-1, keepdim=True),
            v,
            grad,
            scale=scale,
        )
    mask = torch.zeros(1, 1, 40, 150)
    mask[..., ::3] = 1e4
    mask[..., 1::3] = -1e4
    check(path, q, k, v, grad, mask)
    check(path, q, k, v, grad, mask, sinks=torch.tensor([1e4, -1e4]))
    one = torch.full((1, 1, 40, 150), -INF)
    one[..., 77] = 0
    assert torch.equal(run(path, q, k, v, mask=one)["out"], v[:, :, 77:78].expand(-1, -1, 40, -1))


def test_nan_reaches_its_rows(path):
    q, k, v, _ = random_case(1, (2, 2), 40, 150, 32)
    clean = run(path, q, k, v, right=0, to_end=True)["out"]
    for what, seen in (("q", range(7, 8)), ("k", range(10, 40)), ("v", range(10, 40))):
        given_case = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        place = 7 if what == "q" else 120  # the key of query 10
        given_case[what][0, 1, place, 5] = math.nan
        out = run(path, *given_case.values(), right=0, to_end=True)["out"]
        assert torch.equal(out[0, 0], clean[0, 0])
        for row in range(40):
            bad = out[0, 1, row] if what != "v" else out[0, 1, row, 5]
            if row in seen:
                assert bad.isnan().all()
            elif what != "v":  # a value of which nothing is taken is still multiplied, by zero
                assert bad.isfinite().all()
    for what in ("q", "k", "v"):
        given_case = {"q": q.clone(), "k": k.clone(), "v": v.clone()}
        given_case[what][0, 1, 7, 5] = INF
        out = run(path, *given_case.values())["out"]
        assert not out[0, 1].isfinite().all() and torch.isfinite(out[0, 0]).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strides(dtype):
    q, k, v, grad = random_case(2, (4, 2), 33, 50, 40, dtype=dtype)
    plain = run("cpp", q, k, v, grad, right=0)

    def by_token(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def in_part(x):  # of something larger, last dimension dense or not
        return torch.stack((x, x), dim=2)[:, :, 1]

    for change in (by_token, in_part, lambda x: x.mT.contiguous().mT):
        other = run("cpp", *map(change, (q, k, v, grad)), right=0)
        assert all(torch.equal(other[name], plain[name]) for name in plain)
    assert (
        plain["out"].transpose(1, 2).is_contiguous() and plain["k"].transpose(1, 2).is_contiguous()
    )
    wide = run("cpp", q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), grad, right=0)
    alike = run("cpp", q, k[:1].repeat(2, 1, 1, 1), v[:1].repeat(2, 1, 1, 1), grad, right=0)
    assert all(torch.equal(wide[name], alike[name]) for name in wide)


def test_independent_of_threads(restore_threads):
    cases = [
        (random_case(2, (4, 2), 300, 500, 40), {"right": 0, "to_end": True}),
        (random_case(1, (4, 1), 900, 900, 64), {"sinks": torch.ones(4), "dropout": 0.2, "seed": 3}),
        (random_case(1, (8, 2), 2, 3000, 64, dtype=BF16), {}),
    ]
    for case, options in cases:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run("cpp", *case, **options))
        for other in results[1:]:
            assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(path, dtype):
    q_offsets, k_offsets = [0, 5, 5, 40, 41, 200], [0, 9, 30, 65, 65, 300]
    q, k, v, grad = random_case(1, (4, 2), 200, 300, 40, dtype=dtype)
    offsets = (torch.tensor(q_offsets), torch.tensor(k_offsets))
    for rules in (
        {},
        {"right": 0, "to_end": True, "sinks": torch.linspace(-1, 1, 4)},
        {"right": 0, "left": 50, "softcap": 2.0, "slopes": slopes_of(4), "dropout": 0.3, "seed": 5},
    ):
        got = run(path, q, k, v, grad, offsets=offsets, **rules)
        sinks, sinks_bound = 0, 0
        for i in range(5):
            rows, keys = slice(*q_offsets[i : i + 2]), slice(*k_offsets[i : i + 2])
            parts = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            wanted = exact(*parts, grad=grad[:, :, rows], scale=40**-0.5, first=i, **rules)
            for name in ("out", "q", "k", "v"):
                part = got[name][:, :, keys if name in "kv" else rows]
                assert_within(part, wanted.value[name], wanted.bound[name])
            if "sinks" in rules:
                sinks, sinks_bound = (
                    sinks + wanted.value["sinks"],
                    sinks_bound + wanted.bound["sinks"],
                )
        if "sinks" in rules:
            assert_within(got["sinks"], sinks, sinks_bound + 1e-6 * abs(sinks))


def test_packed_sequences_as_a_function():
    q, k, v, _ = random_case(1, (4, 2), 60, 60, 24)
    q, k, v = (x[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v))
    ends = torch.tensor([0, 20, 60])
    out = attention_varlen(q, k, v, ends, is_causal=True, window=(10, 3), scale=0.2)
    out.sum().backward()
    grads, out = [x.grad for x in (q, k, v)], out.detach()
    alone = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    for rows in (slice(0, 20), slice(20, 60)):
        parts = (x[rows].transpose(0, 1) for x in alone)
        part = attention(*parts, is_causal=True, window=(10, 3), scale=0.2, enable_gqa=True)
        torch.testing.assert_close(part.transpose(0, 1), out[rows])
        part.sum().backward()
    for grad, x in zip(grads, alone):
        torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous() and out.shape == (60, 4, 24)


def test_dropout_hash():
    """dropout_factors, from its description and in Python's integers."""

    def mix(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    seed, p = 0x123456789ABCDEF, 0.25
    factors = dropout_factors(torch.tensor(seed), torch.tensor([0, 7]), 3, 5, 9, p)
    for b, h, i, j in itertools.product(range(2), range(3), range(5), range(9)):
        row = 0
        for word in (seed % 2**32, seed >> 32, (0, 7)[b], h, i):
            row = mix(((row ^ word) + 0x9E3779B9) % 2**32)
        dropped = mix((row + j * 0x9E3779B9) % 2**32) < 2**30
        assert factors[b, h, i, j] == (0 if dropped else 4 / 3)


def test_dropout_is_random():
    ones = torch.ones(2, 4, 64, 64)
    drawn = attention(ones, ones, ones, dropout_p=0.3, seed=1)
    # Of 64 keys, so many are kept: 0.7 of them, and independently of each other.
    kept = dropout_factors(torch.tensor(1), torch.arange(2), 4, 64, 64, 0.3) > 0
    share = kept.double()
    torch.testing.assert_close(drawn, (share.mean(-1, keepdim=True) / 0.7).float().expand_as(drawn))
    deviation = math.sqrt(0.21)
    assert abs(share.mean() - 0.7) < 5 * deviation / math.sqrt(share.numel())
    centred = share - 0.7
    for dim in range(4):  # neighbours in every direction
        there, here = (
            centred.narrow(dim, 1, kept.shape[dim] - 1),
            centred.narrow(dim, 0, kept.shape[dim] - 1),
        )
        assert abs((there * here).mean()) < 5 * 0.21 / math.sqrt(here.numel())
    a, b = (attention(ones, ones, ones, dropout_p=0.3, seed=seed) for seed in (1, 2))
    assert torch.equal(a, drawn) and not torch.equal(a, b)
    torch.manual_seed(0)
    c, d = (attention(ones, ones, ones, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(attention(ones, ones, ones, dropout_p=0.3), c) and not torch.equal(c, d)


def test_gradcheck_of_the_reference():
    forward, backward = (
        implementations(name)["reference"] for name in ("attention", "attention_backward")
    )

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, mask, sinks, rules):
            rest = (mask, None, 0, None, None, 0.4, *rules[:3], rules[3], rules[4], sinks, *rules[5:])
            out, lse = forward(q, k, v, *rest)
            ctx.rest, ctx.tensors = rest, (q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            want = ctx.rest[0] is not None and ctx.rest[0].is_floating_point()
            dq, dk, dv, dmask, dsinks = backward(grad, *ctx.tensors, *ctx.rest, want)
            dmask = dmask.sum_to_size(ctx.rest[0].shape) if want else None
            return dq, dk, dv, dmask, dsinks, None

    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = leaf(2, 4, 5, 3), leaf(2, 2, 6, 3), leaf(2, 2, 6, 2)
    seed = torch.tensor(3)
    for rules in (
        (-1, -1, False, 0.0, None, 0.0, None),
        (3, 1, True, 1.5, slopes_of(4).double(), 0.3, seed),
    ):
        torch.autograd.gradcheck(Reference.apply, (q, k, v, leaf(1, 4, 1, 6), leaf(4), rules))
    # sinks are f32 to the op: f64 ones are for this test only


def arguments(
    *case, mask=None, blocks=(None, 0), dropout=0.0, seed=None, sinks=None, offsets=(None, None)
):
    return (*case, mask, *blocks, *offsets, 0.3, 9, 2, True, 1.0, None, sinks, dropout, seed)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_opcheck(dtype):
    *case, grad = random_case(2, (4, 2), 12, 20, 24, dtype=dtype)
    case = [x.requires_grad_() for x in case]
    mask = torch.randn(2, 1, 12, 20).to(dtype).requires_grad_()
    sinks, seed = torch.randn(4).requires_grad_(), torch.tensor(5)
    op, backward = torch.ops.memlm.attention.default, torch.ops.memlm.attention_backward.default
    torch.library.opcheck(op, arguments(*case))
    torch.library.opcheck(op, arguments(*case, mask=bool_mask((1, 1, 12, 20))))
    torch.library.opcheck(op, arguments(*case, mask=mask, sinks=sinks, dropout=0.2, seed=seed))
    given_case = [x.detach() for x in case]
    out, lse = op(*arguments(*given_case))
    torch.library.opcheck(backward, (grad, *arguments(*given_case, out, lse), False))
    packed = [x.detach()[:1] for x in case]
    offsets = (torch.tensor([0, 5, 12]), torch.tensor([0, 11, 20]))
    torch.library.opcheck(op, arguments(*packed, offsets=offsets))


def test_compile():
    torch._dynamo.reset()
    q, k, v, _ = random_case(2, (4, 2), 12, 20, 24)
    mask = torch.randn(12, 20)

    def layer(q, k, v, mask, dropout):
        return attention(q.relu(), k, v, mask, dropout, True, enable_gqa=True, window=(5, 2)) * 2

    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (compiled, layer):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, mask)]
        out = function(*leaves, 0.0)
        out.sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    assert not torch.equal(compiled(q, k, v, mask, 0.3), compiled(q, k, v, mask, 0.3))
    with torch.autocast("cpu", BF16):
        assert torch.compile(layer, fullgraph=True)(q, k, v, mask, 0.0).dtype == BF16


def test_autocast():
    q, k, v, _ = random_case(2, (4, 2), 12, 20, 24)
    mask = torch.randn(12, 20)
    for dtype in (BF16, F16):
        with torch.autocast("cpu", dtype):
            out = attention(q, k, v, mask, enable_gqa=True)
        assert out.dtype == dtype
        cast = (x.to(dtype) for x in (q, k, v, mask))
        assert torch.equal(out, attention(*cast, enable_gqa=True))


def test_gradients_of_the_function():
    """Autograd hands each leaf its own gradient."""
    q, k, v, grad = random_case(2, (4, 2), 12, 20, 24)
    mask, sinks = torch.randn(4, 1, 20), torch.randn(4)
    leaves = {"q": q, "k": k, "v": v, "mask": mask, "sinks": sinks}
    for wanted in (tuple(leaves), ("q",), ("k", "mask"), ("v", "sinks")):
        mine = {name: x.clone().requires_grad_(name in wanted) for name, x in leaves.items()}
        out = attention(
            *(mine[n] for n in "qkv"),
            mine["mask"],
            sinks=mine["sinks"],
            enable_gqa=True,
            is_causal=True,
        )
        out.backward(grad)
        expected = exact(q, k, v, mask[None], grad, sinks=sinks, scale=24**-0.5, right=0)
        for name, x in mine.items():
            assert (x.grad is not None) == (name in wanted)
            if name in wanted:
                value, bound = expected.value[name], expected.bound[name]
                assert_within(x.grad, value.view(x.shape), bound.view(x.shape))


# The argument forms of torch's function: shapes of query, key, value, mask, and the rest.
FORMS = [
    ((9, 8), (11, 8), (11, 8), None, {}),
    ((3, 9, 8), (3, 11, 8), (3, 11, 5), None, {"is_causal": True}),
    ((3, 9, 8), (1, 11, 8), (1, 11, 5), None, {}),
    ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), None, {"scale": 0.1}),
    ((2, 3, 9, 8), (1, 3, 11, 8), (2, 3, 11, 8), (11,), {}),
    ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), (9, 11), {}),
    ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), (3, 1, 11), {}),
    ((2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), (2, 1, 9, 1), {}),
    ((2, 6, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), (2, 6, 9, 11), {"enable_gqa": True}),
    ((6, 9, 8), (2, 11, 8), (2, 11, 8), (6, 9, 11), {"enable_gqa": True}),
    ((4, 2, 3, 9, 8), (4, 2, 3, 11, 8), (4, 2, 3, 11, 8), (2, 1, 9, 11), {}),
    ((4, 2, 3, 9, 8), (4, 1, 3, 11, 8), (1, 2, 3, 11, 8), (1, 1, 3, 9, 11), {}),
    ((0, 3, 9, 8), (0, 3, 11, 8), (0, 3, 11, 8), (9, 11), {}),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_drop_in_for_torch(form):
    *shapes, mask_shape, rest = form
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    masks = [None] if mask_shape is None else [bool_mask(mask_shape), torch.randn(mask_shape)]
    for mask in masks:
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = True  # where a query sees nothing, torch's kernels differ
        in_f64 = mask.double() if mask is not None and mask.is_floating_point() else mask
        expected = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), in_f64, **rest
        )
        for dtype, error in ((F32, 1e-5), (BF16, 0.03)):
            given_mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
            out = attention(q.to(dtype), k.to(dtype), v.to(dtype), given_mask, **rest)
            torch.testing.assert_close(out, expected.to(dtype), rtol=error, atol=error)


def test_causal_with_a_mask_and_windows():
    q, k, v, _ = random_case(1, (2, 2), 9, 9, 8)
    i, j = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    mask = bool_mask((9, 9)).fill_diagonal_(True)
    for options, seen in (
        ({"attn_mask": mask, "is_causal": True}, mask & (j <= i)),
        ({"window": 3}, (j <= i) & (j > i - 3)),
        ({"window": (2, 4)}, (j >= i - 2) & (j <= i + 4)),
        ({"window": (2, -1)}, j >= i - 2),
        ({"window": (-1, 4), "is_causal": True}, j <= i),
    ):
        expected = F.scaled_dot_product_attention(q, k, v, seen)
        torch.testing.assert_close(attention(q, k, v, **options), expected)
    expected = F.scaled_dot_product_attention(q[:, :, -3:], k, v, (j <= i)[-3:])
    torch.testing.assert_close(attention(q[:, :, -3:], k, v, is_causal=True, to_end=True), expected)


def test_memory_is_not_quadratic():
    """4,096 tokens: one head's matrix would take 67 MB."""
    script = """
import torch
from memlm import memory
from memlm.ops import attention
x = [torch.randn(1, 4, 4096, 32, requires_grad=True) for _ in range(3)]
attention(*(t[:, :, :64] for t in x)).sum().backward()
memory.reset_peak()
before = memory.resident_bytes()
attention(*x, is_causal=True).sum().backward()
print((memory.peak_bytes() - before) / 1e6)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert float(done.stdout) < 40


def test_bad_input():
    q, k, v, _ = random_case(2, (4, 2), 12, 20, 24)
    wide = {"enable_gqa": True}

    def refused(error, match, *args, **options):
        with pytest.raises(error, match=match):
            attention(*args, **options)

    refused(TypeError, "query: got torch.float64", q.double(), k, v)
    refused(TypeError, "value: got list", q, k, [1.0])
    refused(TypeError, "key: got torch.bfloat16", q, k.bfloat16(), v, **wide)
    refused(ValueError, r"query, key, value: got \[4, 3, 4\] dimensions", q, k[0], v)
    refused(ValueError, r"key: .* have \[4, 2, 2\] heads: enable_gqa", q, k, v)
    refused(
        ValueError,
        "key: got 3 heads",
        q,
        k[:, :1].repeat(1, 3, 1, 1),
        v[:, :1].repeat(1, 3, 1, 1),
        **wide,
    )
    refused(ValueError, r"key: got shape \[2, 2, 20, 23\]", q, k[..., :23], v, **wide)
    refused(ValueError, r"value: got shape \[2, 2, 19, 24\]", q, k, v[:, :, :19], **wide)
    refused(ValueError, "do not broadcast", q, k.repeat(2, 1, 1, 1)[:3], v, **wide)
    long = torch.ones(1, 1, 1, 513)
    refused(ValueError, "query: got a last dimension of 513", long, long, long[..., :8])
    refused(TypeError, "attn_mask: got list", q, k, v, [1], **wide)
    refused(
        TypeError,
        "attn_mask: got torch.int64",
        q,
        k,
        v,
        torch.ones(12, 20, dtype=torch.int64),
        **wide,
    )
    refused(
        ValueError, r"attn_mask: got shape \[1, 1, 12, 19\]", q, k, v, torch.ones(12, 19), **wide
    )
    refused(ValueError, "attn_mask: got 5 dimensions", q, k, v, torch.ones(1, 1, 1, 12, 20), **wide)
    refused(ValueError, "attn_mask: .* first dimensions", q, k, v, torch.ones(3, 1, 12, 20), **wide)
    refused(ValueError, "dropout_p: got 1.0", q, k, v, dropout_p=1.0, **wide)
    refused(ValueError, "window: got 0", q, k, v, window=0, **wide)
    refused(ValueError, r"window: got \(1, 2, 3\)", q, k, v, window=(1, 2, 3), **wide)
    refused(ValueError, r"slopes: got torch.float32 \[3\]", q, k, v, slopes=torch.ones(3), **wide)
    refused(ValueError, "sinks: got torch.float64", q, k, v, sinks=torch.ones(4).double(), **wide)
    refused(
        ValueError,
        "slopes: requires a gradient",
        q,
        k,
        v,
        slopes=torch.ones(4).requires_grad_(),
        **wide,
    )
    refused(RuntimeError, "softcap: got -1", q, k, v, softcap=-1.0, **wide)

    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    ends = torch.tensor([0, 12])
    with pytest.raises(ValueError, match=r"q_offsets: got \[0, 11\]"):
        attention_varlen(q, k, v, torch.tensor([0, 11]), torch.tensor([0, 20]))
    with pytest.raises(ValueError, match=r"k_offsets: got \[0, 12\]"):
        attention_varlen(q, k, v, ends)
    with pytest.raises(ValueError, match="k_offsets: got torch.int32"):
        attention_varlen(q, k, v, ends, torch.tensor([0, 20], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"key: got shape \[1, 20"):
        attention_varlen(q, k[None], v, ends)


def test_the_ops_read_nothing_they_should_not():
    q, k, v, grad = random_case(2, (4, 2), 12, 20, 24)
    out, lse = torch.ops.memlm.attention(*arguments(q, k, v))
    backward = torch.ops.memlm.attention_backward
    offsets = torch.tensor([0, 12]), torch.tensor([0, 20])
    for bad in (
        arguments(q, k[:1], v), arguments(q, k, v[:, :, :3]), arguments(q, k, v.half()),
        arguments(q.double(), k.double(), v.double()), arguments(q[0], k, v),
        arguments(q, k, v, mask=torch.ones(1, 1, 12, 19)), arguments(q, k, v, sinks=torch.ones(3)),
        arguments(q, k, v, dropout=0.1), arguments(q, k, v, offsets=offsets),
        arguments(q[:1], k[:1], v[:1], offsets=(offsets[0] + 1, offsets[1])),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.memlm.attention(*bad)
    for given_grad, given_out, given_lse in (
        (grad[:1], out, lse),
        (grad, out[..., :8], lse),
        (grad, out, lse[:1]),
    ):
        with pytest.raises(RuntimeError):
            backward(given_grad, *arguments(q, k, v, given_out, given_lse), False)
