"""attention and attention_backward in Triton's interpreter against f64, with the cases of the CPU's tests,
within the bounds that test_cuda_attention.py adds: the arithmetic is the same."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings

from .attention_numerics import exact
from .test_attention import (
    BF16, DIMS, F16, F32, HEADS, LENGTHS, bool_mask, cases, float_mask, random_case, slopes_of,
)  # fmt: skip
from .test_attention import run as run_ops
from .test_block_mask import blocks_of
from .test_cuda_attention import judge, judge_gradients
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.kernels._attention import SPACE  # noqa: E402

DTYPES = [F16, BF16, F32]
SINKS = torch.linspace(-2, 3, 4)


def sizes(config) -> tuple[int, int]:
    return config.kwargs["OWN"], config.kwargs["STEP"]


def config_of(own: int, step: int):
    return next(c for c in SPACE if sizes(c) == (own, step))


TINY, SMALL, LARGE = config_of(32, 16), config_of(32, 32), config_of(64, 64)


def run(config, *case, **options):
    """Results by name."""
    both = [
        partial(kernels.implementation(name), config=config) for name in ("attention", "attention_backward")
    ]
    return run_ops(both, *case, **options)


def check(config, q, k, v, grad, mask=None, **options):
    options = {"scale": q.shape[-1] ** -0.5} | options
    got = run(config, q, k, v, grad, mask, **options)
    out, lse = got.pop("out"), got.pop("lse")
    assert all(x.dtype == q.dtype for x in (out, *(got[name] for name in "qkv"))) and lse.dtype == F32
    judge(out, lse, q, k, v, mask, **options)
    judge_gradients(got, q, k, v, grad, mask, **options)


def config_for(dim: int, dtype):
    """One that any GPU with matrix instructions has room for."""
    return TINY if dtype == F32 else SMALL if dim > 64 else LARGE


def check_heads(dims, heads, dtype, turn):
    case = random_case(1, heads, 35, 75, *dims, dtype=dtype)
    check(config_for(max(dims), dtype), *case, right=0, to_end=bool(turn % 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes_and_groups(dtype):
    for turn, (dims, heads) in enumerate([((64, 64), (2, 1)), ((24, 40), (1, 1))]):
        check_heads(dims, heads, dtype, turn)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [*((dim, dim) for dim in DIMS), (16, 200), (128, 100), (1, 7)], ids=str)
def test_all_head_sizes_and_groups(dtype, dims):
    for turn, heads in enumerate(HEADS):
        check_heads(dims, heads, dtype, turn)


@pytest.mark.parametrize("q_len, k_len", [(1, 1), (65, 64), (3, 0), (0, 5)])
def test_lengths(q_len, k_len):
    check(LARGE, *random_case(1, (2, 1), q_len, k_len, 24, dtype=F16), left=20, right=3, to_end=True)


@pytest.mark.gpu_proof
def test_all_lengths():
    for q_len, k_len in itertools.product(LENGTHS, LENGTHS):
        if (q_len * 7 + k_len) % 3 == 0 or min(q_len, k_len) < 2 or q_len == k_len:
            rules = [{}, {"right": 0}, {"right": 0, "to_end": True}][(q_len + k_len) % 3]
            check(LARGE, *random_case(1, (2, 1), q_len, k_len, 24, dtype=F16), **rules)


@pytest.mark.gpu_proof
def test_long():
    """All kinds of steps: at both edges, and between them."""
    check(SMALL, *random_case(1, (2, 1), 500, 700, 16, dtype=BF16), right=0, to_end=True)
    check(SMALL, *random_case(1, (1, 1), 1, 3000, 16, dtype=F16))
    check(SMALL, *random_case(1, (1, 1), 3000, 2, 16, dtype=F32))
    check(SMALL, *random_case(2, (3, 3), 300, 400, 16, dtype=F16), left=100, right=30)


def test_steps_between_the_edges():
    check(TINY, *random_case(1, (1, 1), 70, 100, 16, dtype=F16), left=50, right=20)


def test_options():
    case = partial(random_case, 1, (4, 2), 33, 40, 24)
    check(LARGE, *case(dtype=F16), softcap=0.5, left=7)
    check(LARGE, *case(dtype=BF16), float_mask((1, 4, 33, 40), BF16), slopes=slopes_of(4), sinks=SINKS)
    mask = bool_mask((1, 4, 33, 40))
    mask[0, 1, 3:9] = False
    check(LARGE, *case(dtype=F32), mask, dropout=0.3, seed=2**62 - 7, scale=-0.5)


@pytest.mark.gpu_proof
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_every_combination_of_options(given_case):
    case, mask, options = given_case
    check(SMALL, *case, mask, **options)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("config", SPACE, ids=str)
def test_every_configuration(config):
    for turn, dtype in enumerate(DTYPES if sizes(config)[0] < 64 else (F16, BF16)):
        case = random_case(2, (4, 2), 150, 170, 40, 64, dtype=dtype, seed=turn)
        check(config, *case, right=20, left=70)
        mask = float_mask((2, 1, 150, 170), dtype)
        options = {"softcap": 2.0, "slopes": slopes_of(4), "sinks": SINKS, "dropout": 0.2, "seed": turn}
        check(config, *case, mask, **options)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_every_shape(dtype):
    sizes = (2, 4, 19, 33)
    case = random_case(2, (4, 2), 19, 33, 24, dtype=dtype)
    for sized in itertools.product([False, True], repeat=4):
        shape = [n if whole else 1 for n, whole in zip(sizes, sized)]
        check(SMALL, *case, bool_mask(shape))
        check(SMALL, *case, float_mask(shape, dtype))
    check(SMALL, *case, float_mask(sizes[::-1], dtype).permute(3, 2, 1, 0))
    check(SMALL, *case, bool_mask(sizes[::-1]).permute(3, 2, 1, 0))


def check_block_mask(size, config, q_len, k_len):
    q, k, v, grad = random_case(1, (2, 1), q_len, k_len, 24, dtype=F16)
    blocks = blocks_of((1, 2), q_len, k_len, size, 0.6)
    blocks[..., 1] = False
    rules = {"block_mask": blocks, "mask_block": size, "right": 30, "scale": 0.3}
    check(config, q, k, v, grad, **rules)
    # Hidden keys and values are not read.
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, size : 2 * size], bad_v[:, :, size : 2 * size] = math.nan, math.nan
    expected, got = run(config, q, k, v, grad, **rules), run(config, q, bad_k, bad_v, grad, **rules)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_block_mask():
    check_block_mask(32, SMALL, 50, 80)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_block_masks(size):
    for config in SPACE:
        if all(size % n == 0 for n in sizes(config)):
            check_block_mask(size, config, 140, 200)


def test_packed_sequences():
    """Results of each sequence alone, exactly: the sums are the same; and dropout that counts sequences."""
    q_ends, k_ends = torch.tensor([0, 20, 20, 70, 71]), torch.tensor([0, 50, 55, 55, 90])
    q, k, v, grad = random_case(1, (2, 1), 71, 90, 24, dtype=F16)
    options = {"left": 40, "right": 3, "to_end": True, "scale": 0.3}
    offsets = {"offsets": (q_ends, k_ends)}
    got = run(LARGE, q, k, v, grad, **offsets, **options)
    dropped = run(LARGE, q, k, v, **offsets, dropout=0.2, seed=9, **options)
    # Offsets beyond the end count as the end.
    beyond = {"offsets": (q_ends + 100 * (q_ends == 71), k_ends + 100 * (k_ends == 90))}
    for name, x in run(LARGE, q, k, v, **beyond, **options).items():
        assert torch.equal(x, got[name])
    for s in range(4):
        rows, keys = slice(*q_ends[s : s + 2].tolist()), slice(*k_ends[s : s + 2].tolist())
        case = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        alone = run(LARGE, *case, grad[:, :, rows], **options)
        for name, x in alone.items():
            assert torch.equal(got[name][:, :, keys if name in ("k", "v") else rows], x)
        if rows.start < rows.stop:
            wanted = exact(*case, first=s, dropout=0.2, seed=9, **options)
            assert (dropped["out"][:, :, rows].double() - wanted.value["out"]).abs().max() < 4e-3
            lse = dropped["lse"][:, :, rows].double()
            torch.testing.assert_close(lse, wanted.value["lse"], atol=1e-5, rtol=1e-5)


def test_rows_that_see_nothing():
    q, k, v, grad = random_case(1, (2, 1), 30, 40, 24)
    mask = bool_mask((1, 2, 30, 40))
    mask[0, 1, 3:9] = False
    sinks = torch.tensor([0.5, -3.0])
    for more in ({}, {"sinks": sinks}):
        got = run(LARGE, q, k, v, grad, mask, **more)
        assert not got["out"][0, 1, 3:9].any() and not got["q"][0, 1, 3:9].any()
        lse = got["lse"][0, 1, 3:9]
        assert torch.equal(lse, torch.full_like(lse, more["sinks"][1] if more else -math.inf))
    # More queries than keys: the first stand before all keys.
    q, k, v, grad = random_case(1, (1, 1), 30, 10, 24)
    check(LARGE, q, k, v, grad, right=0, to_end=True)
    assert not run(LARGE, q, k, v, right=0, to_end=True)["out"][:, :, :20].any()


def test_extreme_scores():
    q, k, v, grad = random_case(1, (1, 1), 20, 40, 32)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    for scale in (1e4, -1e4, 1e-30, 0.0):
        check(LARGE, q, k, v, grad, scale=scale)
    one = torch.full((1, 1, 20, 40), -math.inf)
    one[..., 27] = 0
    assert torch.equal(run(LARGE, q, k, v, mask=one)["out"], v[:, :, 27:28].expand(-1, -1, 20, -1))


def test_nan_reaches_its_rows():
    q, k, v, _ = random_case(1, (2, 2), 40, 50, 32, dtype=F16)
    clean = run(LARGE, q, k, v, right=0, to_end=True)["out"]
    for what, place, seen in (("q", 7, range(7, 8)), ("k", 20, range(10, 40))):
        bad = {"q": q.clone(), "k": k.clone()}
        bad[what][0, 1, place, 5] = math.nan
        out = run(LARGE, *bad.values(), v, right=0, to_end=True)["out"]
        assert torch.equal(out[0, 0], clean[0, 0])
        for row in range(40):
            assert bool(out[0, 1, row].isnan().all()) == (row in seen)


def test_strides():
    case = random_case(1, (4, 2), 20, 30, 24, dtype=F16)
    plain = run(LARGE, *case, right=0)
    assert plain["out"].transpose(1, 2).is_contiguous() and plain["k"].transpose(1, 2).is_contiguous()
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case]
    shifted = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for x in case]
    turned = [x.mT.contiguous().mT for x in case]
    for other in (by_token, shifted, turned):
        assert all(torch.equal(x, plain[name]) for name, x in run(LARGE, *other, right=0).items())


def test_refused():
    long = torch.ones(1, 1, 1, 257, dtype=F16)
    with pytest.raises(kernels.UnsupportedError, match="query: got a last dimension of 257"):
        run(SMALL, long, long, long)
    case = random_case(1, (1, 1), 2, 2, 8)[:3]
    with pytest.raises(kernels.UnsupportedError, match="query: got torch.float64"):
        run(SMALL, *(x.double() for x in case))
    for name, value in (("softcap", -1.0), ("scale", math.inf)):
        with pytest.raises(ValueError, match=f"{name}: got"):
            run(SMALL, *case, **{name: value})
    with pytest.raises(ValueError, match="mask_block: got 48"):
        run(SMALL, *case, block_mask=bool_mask((1, 1, 1, 1)), mask_block=48)
