"""paged_attention in Triton's interpreter, against f64 over what the blocks hold: the CUDA tests' bounds, as
the arithmetic of floats is the same."""

from functools import partial

import pytest
import torch

from memlm.kv_formats import TYPES
from memlm.ops._registry import implementations

from . import test_cuda_paged_attention as cuda
from .paged import paged
from .test_attention import slopes_of
from .test_cuda_paged_attention import check_extreme_scores, types
from .test_paged_attention import random_queries
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.kernels.paged_attention import SPACE  # noqa: E402

check = partial(cuda.check, digits=False)  # all products are of floats
FEW, MANY = SPACE[0], next(config for config in SPACE if config.kwargs["BLOCK_M"] == 64)


def run_in(config, math=torch.bfloat16):
    """What test_cuda_paged_attention.check takes."""

    def run(made, q, new, scale=None, window=0, softcap=0.0, slopes=None, sinks=None, arch=None):
        scale = q.shape[2] ** -0.5 if scale is None else scale
        return kernels.implementation("paged_attention")(
            q, made.pool, made.tails, *made.step(new), scale, window, softcap, slopes, sinks, config=config,
            math=math,
        )  # fmt: skip

    return run


run = run_in(FEW)


@types
def test_heads_and_sizes(type):
    for turn, (dim, kv_heads, group) in enumerate([(64, 2, 1), (80, 1, 4)]):
        dtype = (torch.float16, torch.bfloat16)[turn]
        made = paged(type, dim, [1, 70], kv_heads, (32, 96)[turn], dtype)
        q = random_queries([1, 5], kv_heads * group, dim, dtype)
        assert check(made, q, [1, 5], run=run) > 0.8


@types
@pytest.mark.gpu_proof
@pytest.mark.parametrize(
    "turn, dim, kv_heads, group",
    [
        (0, 64, 2, 1), (1, 80, 1, 4), (2, 96, 3, 3), (3, 128, 2, 8), (4, 33, 1, 2), (5, 256, 1, 5), (6, 1, 2, 7),
        (7, 32, 1, 6), (8, 64, 1, 40), (9, 512, 1, 2),
    ],
)  # fmt: skip
def test_every_head_and_size(type, turn, dim, kv_heads, group):
    """In every configuration.  Bounds grow with a transform's size: of large heads less would fail zeros."""
    lengths, new = [1, 64, 63, 65, 130], [1, 1, 20, 2, 1]
    dtype = (torch.float16, torch.bfloat16)[turn % 2]
    made = paged(type, dim, lengths, kv_heads, (32, 64, 96)[turn % 3], dtype)
    q = random_queries(new, kv_heads * group, dim, dtype)
    assert check(made, q, new, run=run_in(SPACE[turn % len(SPACE)])) > (0.8 if dim <= 128 else 0.6)


@pytest.mark.parametrize("type", ["f32", pytest.param("bf16", marks=pytest.mark.gpu_proof), "int8", "int4"])
def test_products_of_f32(type):
    """As on compute capability 7.5: nothing but what f32 rounds."""
    made, q = paged(type, 64, [70, 33], 1, dtype=torch.float16), random_queries([1, 4], 3, 64, torch.float16)
    run = run_in(FEW, torch.float32)
    assert check(made, q, [1, 4], run=run, parts_off=lambda *_: (0, 0, 0, 0)) > 0.8


def check_windows(type, window, lengths, new):
    made, whole = paged(type, 64, lengths), paged(type, 64, lengths)
    # Blocks that no query sees are gone.
    for table, length, count in zip(made.tables, made.lengths, new):
        first = max(0, length - count - window + 1)
        table[: first // 64] = -1 if window % 2 else 10**6
    q = random_queries(new, 4, 64, torch.bfloat16)
    assert torch.equal(run(made, q, new, window=window), run(whole, q, new, window=window))
    check(whole, q, new, window=window, run=run)


@pytest.mark.parametrize("type, window", [("bf16", 33), ("int4", 64)])
def test_windows(type, window):
    check_windows(type, window, [140, 70], [3, 1])


@types
@pytest.mark.gpu_proof
@pytest.mark.parametrize("window", [1, 2, 33, 64, 65, 1000])
def test_every_window(type, window):
    check_windows(type, window, [65, 130, 70], [2, 20, 0])


def check_options(type, every):
    made, q = paged(type, 64, [5, 130], 1), random_queries([1, 3], 3, 64, torch.float16)
    sinks = torch.linspace(-2, 4, 3)
    each = ({"softcap": 3.0}, {"slopes": slopes_of(3)}, {"sinks": sinks}, {"scale": 0.5}, {"scale": 0.0})
    together = {"softcap": 3.0, "slopes": slopes_of(3), "sinks": sinks, "window": 50}
    for options in (*each, together) if every else (together,):
        check(made, q, [1, 3], run=run, **options)


@pytest.mark.parametrize("type", ["bf16", "int8"])
def test_options_together(type):
    check_options(type, False)


@types
@pytest.mark.gpu_proof
def test_every_option(type):
    check_options(type, True)


def check_long(type, dtype, config):
    """Lengths that programs share out, beside a sequence with more new tokens, which they do not."""
    lengths = [600, 40, 300]
    made, sinks = paged(type, 64, lengths, 1, dtype=dtype), torch.tensor([0.5, 2.0, -1.0])
    for new in ([1, 1, 2], [3, 30, 0]):
        q = random_queries(new, 3, 64, dtype)
        check(made, q, new, sinks=sinks, window=550, run=run_in(config))


def test_long():
    check_long("bf16", torch.bfloat16, FEW)


@types
@pytest.mark.gpu_proof
@pytest.mark.parametrize("dtype, config", [(torch.float16, FEW), (torch.bfloat16, MANY)], ids=str)
def test_long_in_every_type(type, dtype, config):
    check_long(type, dtype, config)


@pytest.mark.parametrize(
    "type", ["int8", *(pytest.param(t, marks=pytest.mark.gpu_proof) for t in ("f32", "bf16", "int4"))]
)
def test_independent_of_what_else_is_in_the_step(type):
    """A sequence's result is the same alone."""
    lengths, new = [1, 300, 130], [1, 2, 20]
    made = paged(type, 64, lengths, 1)
    q, row = random_queries(new, 2, 64, torch.float16), 0
    together = run(made, q, new)
    for i, (length, count) in enumerate(zip(lengths, new)):
        # Of the same table, whose size says how lengths are shared out.
        alone = run(made.part(i, length), q[row : row + count], [count])
        assert torch.equal(alone, together[row : row + count])
        row += count


def test_rows_that_are_not_there():
    """The host thinks of more rows than there are."""
    made, q = paged("bf16", 64, [300, 5], 1), random_queries([1, 1], 2, 64, torch.float16)
    more = torch.cat((q, torch.full((20, 2, 64), float("nan")).half()))
    assert torch.equal(run(made, more, [1, 1])[:2], run(made, q, [1, 1]))


@types
def test_extreme_scores(type):
    check_extreme_scores(type, run, implementations("kv_append")["cpp"], 70, 1)


def test_what_is_not_finite_is_not_seen_before_it_comes():
    """A group of values that is not finite has a scale of NaN."""
    made, q = paged("int8", 64, [20], 1), random_queries([4], 2, 64, torch.float16)
    k, v = made.k[0], made.v[0].clone()
    v[18, 0, 3] = float("nan")
    implementations("kv_append")["cpp"](made.pool, None, k, v, *made.step([20]))
    out = run(made, q, [4])
    assert out[:2].isfinite().all() and out[2:].isnan().all()


def test_no_tokens():
    for type in TYPES:
        for lengths, new in (([], []), ([5, 70], [0, 0])):
            made = paged(type, 64, lengths)
            assert run(made, random_queries(new, 4, 64, torch.float16), new).shape == (0, 4, 64)


def test_queries_that_lie_apart():
    made = paged("bf16", 64, [20], 1)
    q = torch.randn(20, 4, 64, generator=torch.Generator().manual_seed(1)).half()[:, :2]
    across = q.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = run(made, q.contiguous(), [20])
    assert torch.equal(run(made, q, [20]), expected) and torch.equal(run(made, across, [20]), expected)


def test_bad_input():
    made, q = paged("int8", 64, [40, 3]), random_queries([2, 1], 4, 64, torch.float16)
    with pytest.raises(kernels.UnsupportedError, match="q: got torch.float32, Triton kernels take f16 and bf16"):
        run(made, q.float(), [2, 1])
    for error, match, changes in [
        (TypeError, "q: got torch.float64", {"q": q.double()}),
        (ValueError, "q: got 3 heads", {"q": q[:, :3]}),
        (ValueError, "scale: got nan", {"scale": float("nan")}),
        (ValueError, "window: got -1", {"window": -1}),
        (ValueError, "softcap: got -1", {"softcap": -1.0}),
        (ValueError, "slopes: got", {"slopes": slopes_of(3)}),
        (ValueError, "sinks: got torch.float64", {"sinks": slopes_of(4).double()}),
    ]:
        with pytest.raises(error, match=match):
            run(made, changes.pop("q", q), [2, 1], **changes)
