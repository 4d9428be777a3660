"""matmul_topk in Triton's interpreter: kernels/matmul_topk.py."""

import pytest
import torch

from memlm.ops import _matmul

from .matmul_checks import off_by_one, random_case
from .test_cuda_matmul_topk import assert_largest, case
from .test_matmul_topk import CASES, MODES, integers
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.kernels._weight_only import SPACE  # noqa: E402
from memlm.kernels.matmul_topk import LOGITS  # noqa: E402

every_case = pytest.mark.parametrize("format, mode", CASES, ids=str)
F32 = torch.float32
SPLIT = next(config for config in SPACE if config.kwargs["SPLITS"] > 1)
WIDE = SPACE[2]  # features a program, of which the interpreter has few


@pytest.fixture
def short_chunks(monkeypatch):
    """Whose logits the interpreter sorts quickly."""
    monkeypatch.setattr("memlm.kernels.matmul_topk.CHUNK", 256)


def topk(x, packed, bias=None, mode="fast", norm=None, eps=0.0, top=1, config=WIDE, most_logits=LOGITS):
    """values and indices."""
    format = packed.format
    book = _matmul.CODEBOOKS.index(format.codebook)
    return kernels.implementation("matmul_topk")(
        x, packed.codes, packed.scales, packed.offsets, format.bits, book, packed.n, packed.k, format.group, bias,
        MODES.index(mode), norm, eps, top, config=config, most_logits=most_logits,
    )  # fmt: skip


def check(format: str, mode: str, n: int, k: int, m: int, dtype, config=WIDE, most_logits: int = LOGITS) -> None:
    """As assert_largest says; x rounded to int8 is compared with the sorted product in Triton."""
    x, packed, bias, norm = case(format, n, k, m, dtype)
    top = min(n, 7)
    for norm in (norm, None):
        values, indices = topk(x, packed, bias, mode, norm, 1e-5, top, config, most_logits)
        assert values.dtype == F32 and indices.dtype == torch.int64 and indices.shape == (m, top)
        if mode == "w8a8":
            norm = None if norm is None else norm.float()
            given = (packed.codes, packed.scales, n, k, packed.format.group, bias.float(), 0, norm, 1e-5)
            product = kernels.implementation("w8a8_matmul")
            every = product(x.float(), None, *given, False, None, None, config=config)
            expected, at = torch.sort(every, dim=-1, descending=True, stable=True)
            assert torch.equal(values, expected[:, :top]) and torch.equal(indices, at[:, :top])
            continue
        assert_largest(values, indices, x, packed, bias, norm)


@every_case
def test_against_fp64(format, mode, short_chunks):
    for (n, k, m), dtype in zip([(1, 1, 1), (150, 70, 3)], [torch.float16, torch.bfloat16]):
        check(format, mode, n, k, m, dtype)


@pytest.mark.gpu_proof
def test_as_many_as_there_may_be():
    n = top = 2048
    bias = torch.randn(n, generator=torch.Generator().manual_seed(0)).half()
    x, packed = torch.zeros(1, 32, dtype=torch.float16), integers(torch.zeros(n + 100, 32, dtype=torch.int64))
    bias = torch.cat((bias, torch.zeros(100).half()))
    values, indices = topk(x, packed, bias, top=top)
    expected, at = torch.sort(bias.float(), descending=True, stable=True)
    assert torch.equal(values[0], expected[:top]) and torch.equal(indices[0], at[:top])


@pytest.mark.gpu_proof
@every_case
@pytest.mark.parametrize("config", [SPACE[0], WIDE, SPLIT], ids=str)
def test_every_shape(format, mode, config):
    for n, k, m in [(1, 1, 1), (17, 33, 3), (300, 100, 40), (1111, 96, 1)]:
        for dtype in (torch.float16, torch.bfloat16, F32):
            if dtype != F32 or mode == "w8a8":
                check(format, mode, n, k, m, dtype, config)


@pytest.mark.parametrize("format, mode", [CASES[0], CASES[5]], ids=str)
def test_in_panels(format, mode, short_chunks):
    """Of 256 features; the last is narrower."""
    check(format, mode, 300, 32, 2, torch.float16, most_logits=1)


@pytest.mark.parametrize("top", [1, 40])
def test_chunks(top, short_chunks):
    """More logits than a program sorts; ties, too."""
    n = 700
    x, packed = torch.zeros(2, 32, dtype=torch.float16), integers(torch.zeros(n, 32, dtype=torch.int64))
    bias = (torch.arange(n) * 7 % 100).half()
    values, indices = topk(x, packed, bias, top=top)
    expected, at = torch.sort(bias.float(), descending=True, stable=True)
    for row in (0, 1):
        assert torch.equal(values[row], expected[:top]) and torch.equal(indices[row], at[:top])


@pytest.mark.parametrize("n, top", [(1, 1), (40, 40), (300, 17), (150, 150)])
def test_of_equal_logits_the_first_come_first(n, top, short_chunks):
    rows = torch.randint(-2, 2, (n, 1), generator=torch.Generator().manual_seed(n))
    values, indices = topk(torch.ones(2, 32).half(), integers(rows.expand(n, 32)), mode="accurate", top=top)
    expected = (rows[:, 0] * 32).tolist()
    order = sorted(range(n), key=lambda i: (-expected[i], i))[:top]
    assert indices.tolist() == [order, order]
    assert values.tolist() == [[float(expected[i]) for i in order]] * 2


def test_not_finite(short_chunks):
    x = torch.ones(3, 32, dtype=torch.bfloat16)
    packed = integers(torch.arange(40)[:, None].expand(40, 32) % 16 - 8)
    bias = torch.zeros(40, dtype=torch.bfloat16)
    bias[[11, 30]], bias[[5, 7]], bias[20] = torch.nan, torch.inf, -torch.inf
    x[1, 3] = torch.nan
    values, indices = topk(x, packed, bias, "accurate", top=40)
    for row in (0, 2):
        assert indices[row, :5].tolist() == [11, 30, 5, 7, 15] and indices[row, -1] == 20
        assert values[row, :2].isnan().all() and values[row, 2:4].isinf().all()
    assert indices[1].tolist() == list(range(40)) and values[1].isnan().all()


def test_shapes_and_strides(short_chunks):
    x, packed, bias, _ = case("int4-g32", 40, 96, 6, torch.float16)
    expected = topk(x, packed, bias, top=3)
    for same in (off_by_one(x), x.T.contiguous().T):
        assert torch.equal(topk(same, packed, bias, top=3)[1], expected[1])
    values, indices = topk(x.view(2, 3, 96), packed, bias, top=3)
    assert torch.equal(values, expected[0].view(2, 3, 3)) and torch.equal(indices, expected[1].view(2, 3, 3))
    assert topk(x[:0], packed, top=3)[0].shape == (0, 3)


def test_bad_input():
    x, packed, _ = random_case("int4-g32", 40, 96, 6, F32)
    for match, error, given, more in [
        ("top: got 0, accepted is 1 to 40", ValueError, x.half(), {"top": 0}),
        ("top: got 41, accepted is 1 to 40", ValueError, x.half(), {"top": 41}),
        ("mode: got 2 for 4 bits", ValueError, x, {"mode": "w8a8"}),
        ("x: got torch.float32, Triton kernels take f16 and bf16", kernels.UnsupportedError, x, {}),
    ]:
        with pytest.raises(error, match=match):
            topk(given, packed, **more)
    many = integers(torch.zeros(3000, 32, dtype=torch.int64))
    with pytest.raises(kernels.UnsupportedError, match="top: got 2049, the Triton kernel finds up to 2048"):
        topk(x[:, :32].half(), many, top=2049)
