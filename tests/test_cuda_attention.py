"""memlm_cuda_attention on the emulated GPU against f64, with the cases of the CPU's tests.

Beside what attention_numerics allows, probabilities are rounded to q's dtype, which adds a unit roundoff of
sum p |v| (and a smallest number for each key), and scores are kept in units of log2, whose constants and
roundings add some of f32's roundoff of the largest score."""

import math

import pytest
import torch

from .attention_numerics import U, exact
from .cuda_attention import forward
from .emulator import emulator
from .numerics import ROUNDOFF, SMALLEST, assert_within
from .test_attention import BF16, F16, bool_mask, float_mask, random_case, slopes_of

INF = math.inf
DTYPES = [F16, BF16]


def reach(q, k, mask, slopes, scale) -> float:
    """No score is larger."""
    wide = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double().abs()
    most = abs(scale) * max((q.double().abs() @ wide.mT).flatten().tolist(), default=0)
    if mask is not None and mask.is_floating_point():
        most += mask.double().nan_to_num(neginf=0).abs().max().item()
    if slopes is not None:
        most += slopes.max().item() * (q.shape[2] + k.shape[2])
    return most


def check(q, k, v, _grad=None, mask=None, arch=800, **options):
    options = {"scale": q.shape[-1] ** -0.5} | options
    out, lse, _ = forward(q, k, v, mask, arch=arch, **options)
    wanted = exact(q, k, v, mask, **options)
    size = exact(q, k, v.abs(), mask, **options).value["out"]
    scores = 8 * U * reach(q, k, mask, options.get("slopes"), options["scale"])
    dtype, kept = q.dtype, 1 / (1 - options.get("dropout", 0.0))
    bound = wanted.bound["out"] + (2 * ROUNDOFF[dtype] + scores) * size
    bound += SMALLEST[dtype] * kept * v.double().abs().sum(-2).max()
    assert_within(out, wanted.value["out"], bound)
    nothing = wanted.value["lse"] == -INF
    assert torch.equal(lse == -INF, nothing)
    got, expected = (x.masked_fill(nothing, 0) for x in (lse, wanted.value["lse"]))
    assert_within(got, expected, wanted.bound["lse"] + scores + 2.0**-22)
    assert torch.equal(out[nothing], torch.zeros_like(out[nothing]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (40, 24), (1, 7), (128, 100), (16, 200)], ids=str)
def test_head_sizes_and_groups(dtype, dims):
    for turn, heads in enumerate([(2, 1), (3, 3)]):
        case = random_case(1, heads, 35, 75, *dims, dtype=dtype)
        check(*case, right=0, to_end=bool(turn))


@pytest.mark.parametrize("q_len, k_len", [(1, 1), (1, 300), (65, 64), (130, 2), (3, 0), (64, 128)])
def test_lengths(q_len, k_len):
    check(*random_case(2, (2, 1), q_len, k_len, 24, dtype=F16))
    check(*random_case(1, (1, 1), q_len, k_len, 24, dtype=F16), left=20, right=3, to_end=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype):
    case = random_case(2, (4, 2), 33, 70, 24, dtype=dtype)
    slopes, sinks = slopes_of(4), torch.linspace(-2, 3, 4)
    check(*case, softcap=0.5)
    check(*case, slopes=slopes, right=2)
    check(*case, sinks=sinks, left=5, to_end=True)
    check(*case, dropout=0.3, seed=2**62 - 7)
    check(*case, float_mask((2, 4, 33, 70), dtype), scale=-0.5)
    check(*case, float_mask((70, 33, 1, 1), dtype).permute(3, 2, 1, 0), slopes=slopes, sinks=sinks)
    check(*case, bool_mask((1, 4, 1, 70)), softcap=20.0, dropout=0.7, seed=3)
    mask = bool_mask((2, 4, 33, 70))
    mask[0, 1, 3:9] = False
    check(*case, mask)
    check(*case, mask, sinks=sinks)


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_block_mask(size):
    q, k, v, _ = random_case(2, (2, 1), 140, 200, 24, dtype=F16)
    blocks = bool_mask((2, 2, -(-140 // size), -(-200 // size)))
    blocks[..., 1] = False
    check(q, k, v, block_mask=blocks, mask_block=size)
    # Hidden keys and values are not read.
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, size : 2 * size], bad_v[:, :, size : 2 * size] = math.nan, math.nan
    rules = {"block_mask": blocks, "mask_block": size, "right": 30}
    for got, expected in zip(forward(q, bad_k, bad_v, **rules)[:2], forward(q, k, v, **rules)[:2]):
        assert torch.equal(got, expected)


def test_packed_sequences():
    q_ends, k_ends = torch.tensor([0, 20, 20, 90, 91]), torch.tensor([0, 50, 55, 55, 130])
    q, k, v, _ = random_case(1, (4, 2), 91, 130, 24, dtype=F16)
    options = {"left": 40, "right": 3, "to_end": True, "dropout": 0.2, "seed": 9, "scale": 0.3}
    out, lse, _ = forward(q, k, v, offsets=(q_ends, k_ends), **options)
    for s in range(4):
        rows, keys = slice(*q_ends[s : s + 2].tolist()), slice(*k_ends[s : s + 2].tolist())
        if rows.start == rows.stop:
            continue
        wanted = exact(q[:, :, rows], k[:, :, keys], v[:, :, keys], first=s, **options)
        assert (out[:, :, rows].double() - wanted.value["out"]).abs().max() < 4e-3
        got, expected = lse[:, :, rows].double(), wanted.value["lse"]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_strides():
    case = random_case(2, (4, 2), 33, 50, 40, dtype=F16)
    plain = forward(*case[:3], right=0)[0]
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case[:3]]
    shifted = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for x in case[:3]]
    odd = [torch.nn.functional.pad(x, (0, 3))[..., :40] for x in case[:3]]
    for q, k, v in (by_token, shifted, odd):
        assert torch.equal(forward(q, k, v, right=0)[0], plain)
    out = torch.empty(2, 33, 4, 43, dtype=F16)[..., :40].transpose(1, 2)
    assert torch.equal(forward(*case[:3], right=0, out=out)[0], plain)


def test_turing():
    check(*random_case(1, (2, 1), 70, 150, 64, dtype=F16), right=0, to_end=True, arch=750)
    with pytest.raises(RuntimeError, match="dtype: got bf16 on compute capability 7.5"):
        forward(*random_case(1, (1, 1), 2, 2, 8, dtype=BF16)[:3], arch=750)


def test_memory():
    """Keys and values are read once for each block of 64 queries, and no banks collide."""
    q, k, v, _ = random_case(1, (1, 1), 128, 256, 64, dtype=F16)
    counts = emulator().counts(lambda: forward(q, k, v))
    row = 64 * 2 // 32  # sectors
    assert counts.read_sectors == 128 * row + 2 * 2 * 256 * row
    assert counts.shared_passes == counts.shared_least
    assert counts.mmas == 2 * 128 * 256 * 64 // (16 * 8 * 16)


def test_refused():
    case = random_case(1, (2, 1), 4, 4, 8)
    with pytest.raises(RuntimeError, match="dtype: got f32"):
        forward(*case[:3])
    q, k, v = (x.half() for x in case[:3])
    with pytest.raises(RuntimeError, match="head_dim: got 257, accepted are 1 to 256"):
        long = torch.ones(1, 1, 1, 257, dtype=F16)
        forward(long, long, long)
    with pytest.raises(RuntimeError, match="mask_block: got 48"):
        forward(q, k, v, block_mask=bool_mask((1, 1, 1, 1)), mask_block=48)
    for name, value in (("softcap", -1.0), ("dropout", 1.0), ("scale", INF)):
        with pytest.raises(RuntimeError, match=f"{name}: got"):
            forward(q, k, v, **{name: value})
