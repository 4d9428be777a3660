"""memlm_cuda_attention and its gradients on the emulated GPU against f64, with the cases of the CPU's tests.

Beside what attention_numerics allows, probabilities are rounded to q's dtype, which adds a unit roundoff of
sum p |v| (and a smallest number for each key), as does rounding the scores' gradients, and scores are kept in units of log2, whose constants and
roundings add some of f32's roundoff of the largest score."""

import math

import pytest
import torch

from memlm.ops.attention import dropout_factors

from .attention_numerics import U, exact, scores
from .cuda_attention import backward, forward
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


def forward_allowance(q, k, v, mask, options) -> tuple[torch.Tensor, float]:
    """What out may be off by beside attention_numerics' bound, and scores, relative to a probability."""
    size = exact(q, k, v.abs(), mask, **options).value["out"]
    off = 8 * U * reach(q, k, mask, options.get("slopes"), options["scale"])
    kept = 1 / (1 - options.get("dropout", 0.0))
    tiny = SMALLEST[q.dtype] * kept * v.double().abs().sum(-2).max() if k.shape[2] else 0
    return (2 * ROUNDOFF[q.dtype] + off) * size + tiny, off


def judge(out, lse, q, k, v, mask=None, **options):
    """Whether results are within their bounds."""
    wanted = exact(q, k, v, mask, **options)
    more, off = forward_allowance(q, k, v, mask, options)
    bound = wanted.bound["out"] + more
    assert_within(out, wanted.value["out"], bound)
    nothing = wanted.value["lse"] == -INF
    assert torch.equal(lse == -INF, nothing)
    got, expected = (x.masked_fill(nothing, 0) for x in (lse, wanted.value["lse"]))
    assert_within(got, expected, wanted.bound["lse"] + off + 2.0**-22)
    assert torch.equal(out[nothing], torch.zeros_like(out[nothing]))


def check(q, k, v, _grad=None, mask=None, arch=800, **options):
    options = {"scale": q.shape[-1] ** -0.5} | options
    out, lse, _ = forward(q, k, v, mask, arch=arch, **options)
    judge(out, lse, q, k, v, mask, **options)


def judge_gradients(got, q, k, v, grad, mask=None, **options):
    """Whether gradients, by name, are within their bounds."""
    wanted = exact(q, k, v, mask, grad, **options)
    more_out, off = forward_allowance(q, k, v, mask, options)
    rules = {name: x for name, x in options.items() if name not in ("sinks", "dropout", "seed")}
    g, group = grad.double(), q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    double_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    s = scores(q.double(), wide_k, double_mask, **rules)[0]
    lse = wanted.value["lse"]
    p = (s - lse.masked_fill(lse == -INF, 0)[..., None]).exp()
    kept = torch.ones(())
    if dropout := options.get("dropout"):
        numbers = torch.arange(q.shape[0])
        kept = dropout_factors(torch.tensor(options["seed"]), numbers, *p.shape[1:], dropout)
    delta = (g * wanted.value["out"]).sum(-1, keepdim=True).abs()
    more_delta = (g.abs() * more_out).sum(-1, keepdim=True)
    sizes = p * ((g @ wide_v.mT).abs() * kept + delta)
    u, tiny = 2 * ROUNDOFF[q.dtype], SMALLEST[q.dtype]
    exact_ds = 2 * off * sizes + p * more_delta
    ds = exact_ds + u * sizes + tiny

    def shared(x):  # by the heads of a group
        return x.unflatten(1, (-1, group)).sum(2)

    scale = abs(options["scale"])
    more = {
        "q": scale * ds @ wide_k.abs(),
        "k": scale * shared(ds.mT @ q.double().abs()),
        "v": shared(((u + 2 * off) * p * kept + tiny / (1 - options.get("dropout", 0.0))).mT @ g.abs()),
    }
    if "mask" in got:
        more["mask"] = exact_ds.sum_to_size(mask.shape)
    if "sinks" in got:
        share = (options["sinks"].double()[:, None] - lse).exp()[..., None]
        more["sinks"] = (share * (more_delta + 2 * off * delta)).sum((0, 2, 3))
    assert set(got) == set(more)
    for name, result in got.items():
        assert_within(result, wanted.value[name], wanted.bound[name] + more[name])


def check_backward(q, k, v, grad, mask=None, arch=800, **options):
    options = {"scale": q.shape[-1] ** -0.5} | options
    judge_gradients(backward(grad, q, k, v, mask, arch=arch, **options), q, k, v, grad, mask, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    for dims, heads in (((64, 64), (2, 1)), ((40, 24), (3, 3)), ((100, 128), (2, 1)), ((7, 200), (1, 1))):
        check_backward(*random_case(1, heads, 35, 75, *dims, dtype=dtype), right=0, to_end=heads[0] == 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_with_options(dtype):
    case = random_case(2, (4, 2), 33, 40, 24, dtype=dtype)
    slopes, sinks = slopes_of(4), torch.linspace(-2, 3, 4)
    check_backward(*case, softcap=0.5, left=7)
    check_backward(*case, float_mask((2, 4, 33, 40), dtype), slopes=slopes, sinks=sinks)
    mask = bool_mask((2, 4, 33, 40))
    mask[0, 1, 3:9] = False
    check_backward(*case, mask, dropout=0.3, seed=2**62 - 7, scale=-0.5)


@pytest.mark.parametrize("size, dim", [(32, 24), (64, 24), (96, 24), (32, 136)])
def test_gradients_with_a_block_mask(size, dim):
    case = random_case(1, (2, 1), 100, 130, dim, dtype=F16)
    blocks = bool_mask((1, 2, -(-100 // size), -(-130 // size)))
    check_backward(*case, block_mask=blocks, mask_block=size)


def test_gradients_of_packed_sequences():
    """Those of each sequence alone, exactly: the sums are the same."""
    q_ends, k_ends = torch.tensor([0, 20, 20, 90, 91]), torch.tensor([0, 50, 55, 55, 130])
    q, k, v, grad = random_case(1, (4, 2), 91, 130, 24, dtype=F16)
    options = {"left": 40, "right": 3, "to_end": True, "scale": 0.3}
    got = backward(grad, q, k, v, offsets=(q_ends, k_ends), **options)
    for s in range(4):
        rows, keys = slice(*q_ends[s : s + 2].tolist()), slice(*k_ends[s : s + 2].tolist())
        case = (grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys])
        alone = backward(*case, **options)
        assert torch.equal(got["q"][:, :, rows], alone["q"])
        assert torch.equal(got["k"][:, :, keys], alone["k"])
        assert torch.equal(got["v"][:, :, keys], alone["v"])


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


def test_fewer_keys_at_a_time():
    """Where 64 of heads of 128 leave no room for a second block."""
    check(*random_case(1, (2, 1), 140, 170, 128, dtype=F16), right=0, to_end=True, arch=750)


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


@pytest.mark.parametrize("dim", [64, 128, 200])
def test_growing_scores(dim):
    """Sums are multiplied again where weights would exceed 2^8: of some rows and not of others."""
    q, k, v, _ = random_case(1, (2, 1), 100, 330, dim, dtype=F16)
    q *= torch.linspace(0, 4, 100)[:, None]
    k *= torch.linspace(0.1, 4, 330)[:, None]
    check(q, k, v)
    check(q, k.flip(2), v, right=0, to_end=True)


@pytest.mark.parametrize("what", [0, 1])
def test_nan_reaches_the_rows_that_see_it(what):
    case = list(random_case(1, (1, 1), 150, 150, 24, dtype=F16)[:3])
    case[what][0, 0, 70, 5] = math.nan
    for options in ({}, {"softcap": 20.0}):
        out, lse, _ = forward(*case, right=0, **options)
        seen = torch.arange(150) >= 70 if what else torch.arange(150) == 70
        assert torch.equal(out[0, 0].isnan().all(-1), seen) and torch.equal(out[0, 0].isnan().any(-1), seen)
        assert torch.equal(lse[0, 0].isnan(), seen)


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


def test_gradients_on_turing():
    check_backward(*random_case(1, (2, 1), 35, 75, 64, dtype=F16), right=0, arch=750)
    with pytest.raises(RuntimeError, match="head_dim, v_dim: gradients of more than 128 need"):
        case = random_case(1, (1, 1), 2, 2, 200, dtype=F16)
        backward(case[3], *case[:3], arch=750)


def test_memory():
    """Keys and values are read once for each block of 128 queries, and no banks collide."""
    q, k, v, _ = random_case(1, (1, 1), 256, 128, 64, dtype=F16)
    counts = emulator().counts(lambda: forward(q, k, v))
    row = 64 * 2 // 32  # sectors
    assert counts.read_sectors == 256 * row + 2 * 2 * 128 * row
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
