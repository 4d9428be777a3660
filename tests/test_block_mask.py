"""attention with a block mask: every implementation on every instruction set against f64, forward
and backward; what is not seen is not read."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memlm.ops import attention

from .test_attention import (
    BF16,
    DTYPES,
    F32,
    arguments,
    cases,
    check,
    float_mask,
    random_case,
    run,
    slopes_of,
)


def blocks_of(shape, q_len, k_len, size, density, seed=0):
    """A block mask [*shape, blocks, blocks]."""
    generator = torch.Generator().manual_seed(seed)
    counts = -(-q_len // size), -(-k_len // size)
    return torch.rand(*shape, *counts, generator=generator) < density


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_densities(path, dtype):
    # Below, at and above the rows that pass together (64 to 192), in parts of such, and with tails.
    sizes = [
        (32, 97, 200), (64, 131, 70), (96, 200, 260),
        (128, 300, 257), (224, 260, 450), (512, 260, 40),
    ]  # fmt: skip
    for turn, (size, q_len, k_len) in enumerate(sizes):
        heads = ((4, 2), (3, 3))[turn % 2]
        case = random_case(2, heads, q_len, k_len, 24, 16, dtype=dtype, seed=turn)
        for density in (0, 0.25, 1) if dtype == F32 else (0.25,):
            shape = ((2, heads[0]), (1, heads[0]), (2, 1), (1, 1))[turn % 4]
            mask = blocks_of(shape, q_len, k_len, size, density, turn)
            rules = [{}, {"right": 0, "to_end": True}, {"left": 70, "right": 20}][turn % 3]
            wanted = check(path, *case, block_mask=mask, mask_block=size, **rules)
            if density == 0:
                assert not any(wanted.value[name].any() for name in ("out", "q", "k", "v"))


def test_empty_rows_and_columns(path):
    q, k, v, grad = random_case(1, (2, 1), 150, 170, 24)
    mask = blocks_of((1, 2), 150, 170, 32, 0.6)
    mask[:, :, 1] = False
    mask[:, :, :, (0, 3)] = False
    for more in ({}, {"sinks": torch.tensor([0.5, -3.0])}):
        check(path, q, k, v, grad, block_mask=mask, mask_block=32, **more)
        got = run(path, q, k, v, grad, block_mask=mask, mask_block=32, **more)
        rows = slice(32, 64)
        assert not got["out"][:, :, rows].any() and not got["q"][:, :, rows].any()
        lse = more["sinks"][:, None].expand(2, 32) if more else torch.full((2, 32), -math.inf)
        assert torch.equal(got["lse"][0, :, rows], lse)
        for keys in (slice(0, 32), slice(96, 128)):
            assert not got["k"][:, :, keys].any() and not got["v"][:, :, keys].any()


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(cases(), st.sampled_from([32, 64]), st.sampled_from([0.3, 0.7]), *[st.booleans()] * 2)
def test_every_combination_of_options(path, given_case, size, density, by_batch, by_head):
    case, mask, options = given_case
    shape = (case[0].shape[0] if by_batch else 1, case[0].shape[1] if by_head else 1)
    blocks = blocks_of(shape, case[0].shape[2], case[1].shape[2], size, density)
    check(path, *case, mask, block_mask=blocks, mask_block=size, **options)


def test_few_rows_over_many_keys(path):
    """Passages that are cut in parts, some of which see nothing."""
    for heads, q_len in (((4, 2), 1), ((1, 1), 11)):
        mask = blocks_of((1, heads[0]), q_len, 3000, 64, 0.1)
        case = random_case(1, heads, q_len, 3000, 16)
        check(path, *case, block_mask=mask, mask_block=64, left=2500, right=0, to_end=True)


def test_hidden_blocks_are_not_read():
    size = 64
    q, k, v, grad = random_case(2, (4, 2), 200, 300, 24)
    mask = blocks_of((2, 4), 200, 300, size, 0.5)
    mask[:, :, :, (1, 4)] = False
    rules = {"block_mask": mask, "mask_block": size, "slopes": slopes_of(4)}
    clean = run("cpp", q, k, v, grad, **rules)
    bad_k, bad_v = k.clone(), v.clone()
    for keys in (slice(size, 2 * size), slice(4 * size, None)):
        bad_k[:, :, keys], bad_v[:, :, keys] = math.nan, math.nan
    for more in ({}, {"right": 30, "left": 90}):
        expected = run("cpp", q, k, v, grad, **rules, **more)
        got = run("cpp", q, bad_k, bad_v, grad, **rules, **more)
        assert all(torch.equal(got[name], expected[name]) for name in got)
    # What some rows see reaches those, and no others.
    bad_k[:, :, 2 * size : 3 * size] = math.nan
    got = run("cpp", q, bad_k, bad_v, grad, **rules)
    for name in ("out", "q"):
        shown = mask[..., 2].repeat_interleave(size, -1)[..., :200]
        assert got[name][shown].isnan().all()
        assert torch.equal(got[name][~shown], clean[name][~shown])


def test_a_full_mask_changes_nothing_but_rounding():
    q, k, v, grad = random_case(1, (2, 1), 300, 400, 32)
    full = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    dense, masked = (run("cpp", q, k, v, grad, block_mask=mask) for mask in (None, full))
    for name in dense:
        torch.testing.assert_close(masked[name], dense[name])


def test_independent_of_threads(restore_threads):
    results = []
    case = random_case(1, (4, 2), 500, 700, 40)
    few = random_case(1, (4, 1), 2, 3000, 64, dtype=BF16)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        mask, few_mask = blocks_of((1, 4), 500, 700, 96, 0.4), blocks_of((1, 1), 2, 3000, 128, 0.4)
        results.append(
            [
                *run("cpp", *case, block_mask=mask, mask_block=96, right=0, to_end=True).values(),
                *run("cpp", *few, block_mask=few_mask).values(),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_opcheck():
    *case, grad = random_case(2, (4, 2), 40, 70, 24)
    blocks = (blocks_of((2, 1), 40, 70, 32, 0.5), 32)
    op, backward = torch.ops.memlm.attention.default, torch.ops.memlm.attention_backward.default
    out, lse = op(*arguments(*case, blocks=blocks))
    torch.library.opcheck(backward, (grad, *arguments(*case, out, lse, blocks=blocks), False))
    case = [x.requires_grad_() for x in case]
    mask = float_mask((1, 4, 40, 70), F32).requires_grad_()
    torch.library.opcheck(op, arguments(*case, mask=mask, blocks=blocks))


def test_the_function():
    """All forms of block masks, beside torch's function with their elements; with gradients,
    compiled, and under autocast."""
    torch._dynamo.reset()
    q, k, v, grad = random_case(2, (4, 4), 70, 100, 24)

    def layer(q, k, v, blocks):
        q = q.relu()
        return attention(q, k, v, is_causal=True, to_end=True, block_mask=blocks, mask_block=32)

    compiled = torch.compile(layer, fullgraph=True)
    causal = torch.ones(70, 100, dtype=torch.bool).tril(30)
    for shape in ((), (1,), (4,), (1, 4), (2, 1), (2, 4)):
        blocks = blocks_of(shape, 70, 100, 32, 0.5)
        blocks[..., 0] = True  # where a query sees nothing, torch's kernels differ
        elements = blocks.repeat_interleave(32, -1).repeat_interleave(32, -2)[..., :70, :100]
        results = []
        for function, mask in (
            (layer, blocks),
            (compiled, blocks),
            (lambda q, *rest: F.scaled_dot_product_attention(q.relu(), *rest), elements & causal),
        ):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = function(*leaves, mask)
            out.backward(grad)
            results.append([out.detach(), *(x.grad for x in leaves)])
        for ours, other, torchs in zip(*results):
            assert torch.equal(ours, other)
            torch.testing.assert_close(ours, torchs)
    blocks = blocks_of((), 70, 100, 32, 0.5)
    whole = attention(q, k, v, block_mask=blocks, mask_block=32)
    assert torch.equal(attention(q[0], k[0], v[0], block_mask=blocks, mask_block=32), whole[0])
    one = attention(q[0, 0], k[0, 0], v[0, 0], block_mask=blocks, mask_block=32)
    assert torch.equal(one, whole[0, 0])
    with torch.autocast("cpu", BF16):
        assert layer(q, k, v, blocks).dtype == BF16


def test_bad_input():
    q, k, v, _ = random_case(2, (4, 4), 70, 100, 24)
    good = blocks_of((2, 4), 70, 100, 32, 0.5)

    def refused(error, match, mask, size=32):
        with pytest.raises(error, match=match):
            attention(q, k, v, block_mask=mask, mask_block=size)

    for size in (0, -32, 16, 48, 100):
        refused(ValueError, f"mask_block: got {size}, accepted are multiples of 32", good, size)
    refused(ValueError, r"block_mask: got shape \[2, 4, 3, 4\], expected \[2, 4, 2, 2\]", good, 64)
    refused(ValueError, r"block_mask: got shape \[2, 3, 3, 4\]", good[:, :3])
    refused(ValueError, r"block_mask: got shape \[2, 4, 1, 4\]", good[:, :, :1])  # blocks are given
    refused(ValueError, r"block_mask: got shape \[2, 4, 3, 1\]", good[..., :1])
    refused(ValueError, r"block_mask: .* first dimensions", good.repeat(2, 1, 1, 1)[:3])
    refused(ValueError, "block_mask: got 5 dimensions", good[None])
    refused(TypeError, "block_mask: got torch.float32 on cpu", good.float())
    refused(TypeError, "block_mask: got torch.uint8 on cpu", good.byte())
    refused(TypeError, "block_mask: got torch.bool on meta", good.to("meta"))
    refused(TypeError, "block_mask: got list", [[True]])

    offsets = torch.tensor([0, 70]), torch.tensor([0, 100])
    one = [x[:1] for x in (q, k, v)]
    for bad in (
        arguments(q, k, v, blocks=(good[:, :, :2], 32)), arguments(q, k, v, blocks=(good, 16)),
        arguments(q, k, v, blocks=(good, 0)), arguments(q, k, v, blocks=(good[:, :, :1, :1], 144)),
        arguments(q, k, v, blocks=(good[:, :, :1, :1], 2**62)),
        arguments(q, k, v, blocks=(good.byte(), 32)), arguments(q, k, v, blocks=(good[0], 32)),
        arguments(*one, blocks=(good[:1], 32), offsets=offsets),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="block"):
            torch.ops.memlm.attention(*bad)
