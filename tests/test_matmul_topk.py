"""matmul_topk: every implementation and instruction set against f64 and against all logits, ties,
what is not finite, and as a torch op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm import ops
from memlm.formats import pack
from memlm.ops import _matmul
from memlm.ops._registry import implementations

from . import numerics
from .matmul_checks import DTYPES, random_case
from .paths import PATHS, path_id

paths = pytest.mark.parametrize("path", PATHS, ids=path_id)
MODES = ("accurate", "fast", "w8a8")  # as the op numbers them
CASES = [
    ("int4a-g32", "fast"), ("int4-g64", "accurate"), ("nf4-g64", "fast"), ("int8-g32", "accurate"),
    ("int8-g128", "fast"), ("int8-row", "w8a8"), ("int2a-g32", "accurate"),
]  # fmt: skip


def run(path, x, packed, bias=None, mode="fast", norm=None, eps=0.0, top=1):
    name, isa = path
    if isa:
        memlm.set_isa(isa)
    format = packed.format
    book = _matmul.CODEBOOKS.index(format.codebook)
    return implementations("matmul_topk")[name](
        x, packed.codes, packed.scales, packed.offsets, format.bits, book, packed.n, packed.k,
        format.group, bias, MODES.index(mode), norm, eps, top,
    )  # fmt: skip


@paths
@pytest.mark.parametrize("format, mode", [case for case in CASES if case[1] != "w8a8"], ids=str)
def test_against_fp64(format, mode, path, restore_isa):
    """Each value within its own bound of the exact logit at its index; and no logit that is not
    among them is larger than the smallest of them by more than both bounds."""
    for n, k, m in ((1, 1, 1), (17, 33, 3), (300, 100, 40), (1111, 96, 1)):
        for dtype in DTYPES:
            x, packed, bias = random_case(format, n, k, m, dtype)
            norm = (1 + torch.rand(k, generator=torch.manual_seed(1))).to(dtype)
            top = min(n, 7)
            values, indices = run(path, x, packed, bias, mode, norm, 1e-5, top)
            assert values.dtype == torch.float32 and indices.shape == (m, top)
            kind = numerics.arithmetic(path[0], m, mode == "fast")
            # exact_around knows no bias: it is one more rounding of the sum.
            exact, bound = numerics.exact_around(
                x.float(), packed, kind, norm=norm.float(), eps=1e-5
            )
            exact = exact + bias.double()
            bound = bound + numerics.ROUNDOFF[torch.float32] * (exact.abs() + bias.double().abs())
            numerics.assert_within(values, exact.gather(1, indices), bound.gather(1, indices))
            left_out = torch.ones(m, n, dtype=torch.bool).scatter_(1, indices, False)
            above = (exact - bound).masked_fill(~left_out, -torch.inf)
            assert (above <= values[:, -1:].double()).all()


@paths
@pytest.mark.parametrize("format, mode", CASES, ids=str)
def test_are_the_largest_of_all(format, mode, path, restore_isa):
    """The same bits as of all logits, sorted."""
    for m in (1, 5, 40):
        x, packed, bias = random_case(format, 700, 160, m, torch.bfloat16)
        norm = (1 + torch.rand(160, generator=torch.manual_seed(1))).bfloat16()
        values, indices = run(path, x, packed, bias, mode, norm, 1e-5, 9)
        if path[0] == "cpp":
            every = ops.matmul(x.float(), packed, bias.float(), mode, norm.float(), 1e-5)
            expected, at = torch.sort(every, dim=-1, descending=True, stable=True)
            assert torch.equal(values, expected[:, :9]) and torch.equal(indices, at[:, :9])
        else:
            assert (values.diff(dim=-1) <= 0).all()


def integers(codes: torch.Tensor):
    """W of these integers, -8..7 in 4 bits."""
    return pack(
        (codes + 8).to(torch.uint8), torch.ones(len(codes), codes.shape[1] // 32), None, "int4-g32"
    )


@paths
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_of_equal_logits_the_first_come_first(path, data):
    """Logits of few values, in whichever piece they lie; all of them may be asked for."""
    n = data.draw(st.integers(1, 400))
    top = data.draw(st.integers(1, n))
    generator = torch.manual_seed(data.draw(st.integers(0, 99)))
    rows = torch.randint(-2, 2, (n, 1), generator=generator).expand(n, 32)
    values, indices = run(path, torch.ones(2, 32), integers(rows), mode="accurate", top=top)
    expected = (rows[:, 0] * 32).tolist()
    order = sorted(range(n), key=lambda i: (-expected[i], i))[:top]
    assert indices.tolist() == [order, order]
    assert values.tolist() == [[float(expected[i]) for i in order]] * 2


@paths
def test_not_finite(path, restore_isa):
    x, packed = torch.ones(3, 32), integers(torch.arange(40)[:, None].expand(40, 32) % 16 - 8)
    bias = torch.zeros(40)
    bias[[11, 30]], bias[[5, 7]], bias[20] = torch.nan, torch.inf, -torch.inf
    x[1, 3] = torch.nan
    values, indices = run(path, x, packed, bias, "accurate", top=40)
    for row in (0, 2):
        assert indices[row, :5].tolist() == [11, 30, 5, 7, 15] and indices[row, -1] == 20
        assert values[row, :2].isnan().all() and values[row, 2:4].isinf().all()
    assert indices[1].tolist() == list(range(40)) and values[1].isnan().all()


def test_independent_of_threads(restore_threads):
    x, packed, bias = random_case("int4a-g32", 20_000, 576, 5, torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append([run(("cpp", None), x[:m], packed, bias, top=50) for m in (1, 5)])
    for other in results[1:]:
        assert all(
            torch.equal(a, b) for one, two in zip(results[0], other) for a, b in zip(one, two)
        )


def arguments(packed):
    sizes = (packed.format.bits, packed.n, packed.k, packed.format.group)
    return (packed.codes, packed.scales, packed.offsets, *sizes)


def test_torch():
    x, packed, bias = random_case("int4-g32", 40, 96, 6, torch.float32)
    values, indices = ops.matmul_topk(x.view(2, 3, 96), *arguments(packed), bias, top=4)
    assert values.shape == indices.shape == (2, 3, 4) and indices.dtype == torch.int64
    op = torch.ops.memlm.matmul_topk.default
    parts = (packed.codes, packed.scales, packed.offsets, 4, 0, 40, 96, 32)
    torch.library.opcheck(op, (x, *parts, bias, 1, None, 0.0, 3))
    strided = x.repeat(1, 2)[:, ::2]
    assert torch.equal(
        ops.matmul_topk(strided, *arguments(packed))[1],
        ops.matmul_topk(strided.contiguous(), *arguments(packed))[1],
    )
    assert ops.matmul_topk(x[:0], *arguments(packed))[0].shape == (0, 1)

    compiled = torch.compile(lambda x: ops.matmul_topk(x, *arguments(packed), bias), fullgraph=True)
    assert torch.equal(compiled(x)[1], ops.matmul_topk(x, *arguments(packed), bias)[1])
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = ops.matmul_topk(x, *arguments(packed), bias, "accurate")
    rounded = ops.matmul_topk(x.bfloat16(), *arguments(packed), bias.bfloat16(), "accurate")[0]
    assert torch.equal(low, rounded)


def test_bad_input():
    x, packed, bias = random_case("int4-g32", 40, 96, 6, torch.float32)
    parts = arguments(packed)

    def refused(error, match, x=x, parts=parts, **more):
        with pytest.raises(error, match=match):
            ops.matmul_topk(x, *parts, **more)

    refused(ValueError, "top: got 0, accepted is 1 to 40", top=0)
    refused(ValueError, "top: got 41, accepted is 1 to 40", top=41)
    refused(ValueError, "mode: got 'best'", mode="best")
    refused(ValueError, "codebook: got 'x'", codebook="x")
    refused(TypeError, "x: got torch.float64", x=x.double())
    refused(ValueError, r"x: got shape \[6, 95\]", x=x[:, :95])
    refused(TypeError, "bias: got torch.bfloat16", bias=bias.bfloat16())
    refused(ValueError, r"norm: got shape \[95\]", norm=torch.ones(95))
    refused(memlm.FormatError, "codes: got", parts=(packed.codes[:1], *parts[1:]))
    refused(RuntimeError, "mode: got 2 for 4 bits", mode="w8a8")
