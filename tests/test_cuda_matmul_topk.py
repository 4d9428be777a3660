"""matmul_topk on the emulated GPU: csrc/cuda/matmul_topk.cu."""

import contextlib
from ctypes import Structure, byref, c_int, c_int64, c_void_p

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import device, numerics
from .gpu_matmul_checks import in_range
from .emulator import DEVICES, DTYPES, NO_MEMORY, MatmulArgs, Packed, Queue, emulator, matmul, packed_struct, pointer
from .matmul_checks import off_by_one, random_case
from .test_matmul_topk import CASES, MODES, integers

archs = pytest.mark.parametrize("arch", [800, 750])
every_case = pytest.mark.parametrize("format, mode", CASES, ids=str)
F32 = torch.float32


class Linear(Structure):
    """memlm_linear"""

    _fields_ = [("w", Packed), ("bits", c_int), ("mode", c_int), ("bias", c_void_p)]


def topk(x, packed, bias=None, mode="fast", norm=None, eps=0.0, top=1, arch=800, changes=None):
    """values and indices.  ``changes``: of memlm_linear's and memlm_matmul_args' fields."""
    m = len(x)
    values = torch.full((m, top), float("nan"))
    indices = torch.full((m, top), -1)
    linear = Linear(packed_struct(packed), packed.format.bits, MODES.index(mode), pointer(bias))
    args = MatmulArgs(
        m=m, x=pointer(x), x_stride=x.stride(0) if m > 1 else packed.k, dtype=DTYPES[x.dtype],
        norm=pointer(norm), norm_eps=eps,
    )  # fmt: skip
    for key, value in (changes or {}).items():
        setattr(linear if hasattr(linear, key) else args, key, value)
    emulator(arch).run(
        "memlm_cuda_matmul_topk", byref(linear), byref(args), c_int64(top), c_void_p(pointer(values)),
        c_void_p(pointer(indices)), read=[x, bias, norm, *packed.tensors().values()], written=[values, indices],
    )  # fmt: skip
    return values, indices


@contextlib.contextmanager
def of_processors(count: int):
    """The emulated device with so many multiprocessors: panels are narrow where there are few."""
    if device.wanted():
        pytest.skip("only the emulator can be another device")
    there = emulator()
    there.lib.emulator_device(800, count, DEVICES[800][1])
    try:
        yield
    finally:
        there.lib.emulator_device(800, *DEVICES[800])


def case(format: str, n: int, k: int, m: int, dtype: torch.dtype):
    x, packed, bias = random_case(format, n, k, m, F32)
    norm = (1 + torch.rand(k, generator=torch.Generator().manual_seed(1))).to(dtype)
    return in_range(x, dtype), packed, bias.to(dtype), norm


def assert_largest(values, indices, x, packed, bias, norm) -> None:
    """Each value within its own f32 bound of the exact logit at its index; and no logit that is not among
    them is larger than the smallest of them by more than both bounds."""
    if norm is None:
        exact, bound = numerics.exact_matmul(x, packed, bias, "mma", F32)
    else:  # exact_around knows no bias: it is one more rounding of the sum
        exact, bound = numerics.exact_around(x, packed, "mma", norm=norm, eps=1e-5, y_dtype=F32)
        exact = exact + bias.double()
        bound = bound + numerics.ROUNDOFF[F32] * (exact.abs() + bias.double().abs())
    numerics.assert_within(values, exact.gather(1, indices), bound.gather(1, indices))
    left_out = torch.ones(exact.shape, dtype=torch.bool).scatter_(1, indices, False)
    above = (exact - bound).masked_fill(~left_out, -torch.inf)
    assert (above <= values[:, -1:].double()).all()


def check(format: str, mode: str, n: int, k: int, m: int, dtype: torch.dtype, arch: int = 800) -> None:
    """As assert_largest says; x rounded to int8 gives the bits of that product."""
    x, packed, bias, norm = case(format, n, k, m, dtype)
    top = min(n, 7)
    for norm in (norm, None):
        values, indices = topk(x, packed, bias, mode, norm, 1e-5, top, arch)
        if mode == "w8a8":
            after = (c_void_p(None), c_int64(0))
            norm = None if norm is None else norm.float()
            every = matmul("w8a8_matmul", x.float(), packed, bias.float(), norm, 1e-5, after=after, arch=arch)
            expected, at = torch.sort(every, dim=-1, descending=True, stable=True)
            assert torch.equal(values, expected[:, :top]) and torch.equal(indices, at[:, :top])
            continue
        assert_largest(values, indices, x, packed, bias, norm)


@every_case
def test_against_fp64(format, mode):
    for (n, k, m), dtype in zip([(1, 1, 1), (300, 100, 9)], [*DTYPES][1:]):
        check(format, mode, n, k, m, dtype)


@pytest.mark.gpu_proof
@every_case
def test_every_shape(format, mode):
    for n, k, m in [(1, 1, 1), (17, 33, 3), (300, 100, 40), (1111, 96, 1), (130, 4128, 9), (700, 160, 65)]:
        for dtype in [d for d in DTYPES if d != F32 or mode == "w8a8"]:
            check(format, mode, n, k, m, dtype)


def test_turing():
    check("int4a-g32", "fast", 40, 300, 5, torch.float16, arch=750)
    check("int8-row", "w8a8", 40, 300, 5, F32, arch=750)
    x, packed, _, _ = case("int4-g32", 16, 32, 1, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype: got bf16 on compute capability 7.5"):
        topk(x, packed, arch=750)


def test_in_panels():
    """The last is narrower."""
    with of_processors(1):
        check("int8-row", "w8a8", 3700, 32, 9, torch.float16)


@pytest.mark.gpu_proof
@every_case
def test_in_more_panels(format, mode):
    with of_processors(1):
        check(format, mode, 1800, 64, 40, torch.float16)


@pytest.mark.parametrize("top", [pytest.param(1, marks=pytest.mark.gpu_proof), 2048])
def test_chunks_whose_logits_ascend(top):
    """What is kept is sorted again and again: each step has larger ones."""
    n = 9000
    x, packed = torch.zeros(1, 32, dtype=torch.float16), integers(torch.zeros(n, 32, dtype=torch.int64))
    bias = (torch.arange(n) // 8).half()
    values, indices = topk(x, packed, bias, top=top)
    expected, at = torch.sort(bias.float(), descending=True, stable=True)
    assert torch.equal(values[0], expected[:top]) and torch.equal(indices[0], at[:top])


@pytest.mark.gpu_proof
def test_rounds_of_rows():
    """Of 128 rows, as more would leave a panel less than 256 features."""
    with of_processors(1):
        for format, mode in (("int4-g64", "accurate"), ("int8-row", "w8a8")):
            check(format, mode, 270, 40, 150, torch.float16)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_of_equal_logits_the_first_come_first(data):
    """Logits of few values, in whichever chunk they lie; all of them may be asked for."""
    n = data.draw(st.integers(1, 400))
    top = data.draw(st.integers(1, n))
    rows = torch.randint(-2, 2, (n, 1), generator=torch.manual_seed(data.draw(st.integers(0, 99))))
    values, indices = topk(torch.ones(2, 32).half(), integers(rows.expand(n, 32)), mode="accurate", top=top)
    expected = (rows[:, 0] * 32).tolist()
    order = sorted(range(n), key=lambda i: (-expected[i], i))[:top]
    assert indices.tolist() == [order, order]
    assert values.tolist() == [[float(expected[i]) for i in order]] * 2


def test_not_finite():
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


def test_unaligned_rows_and_strides():
    x, packed, bias, _ = case("int4-g32", 40, 90, 9, torch.float16)
    expected = topk(x, packed, bias, top=5)
    wide = torch.full((9, 100), float("nan"), dtype=torch.float16)
    wide[:, :90] = x
    for same in (off_by_one(x), wide[:, :90]):
        for one, other in zip(topk(same, packed, bias, top=5), expected):
            assert torch.equal(one, other)


@pytest.mark.skipif(device.wanted(), reason="of the emulated device")
@pytest.mark.parametrize("m", [1, 512])
def test_workspace(m):
    """As much as it says at its head, of a vocabulary of 151,936: asked for, not used."""
    n, k, top = 151_936, 4096, 50
    w = packed_struct(case("int4-g32", 16, 32, 1, torch.float16)[1])
    w.n, w.k = n, k
    linear, queue, there = Linear(w, 4, 1, None), Queue(), 1 << 20
    args = MatmulArgs(m=m, x=there, x_stride=k, dtype=1, norm=there, norm_eps=1e-5)
    given = (byref(linear), byref(args), c_int64(top), c_void_p(there), c_void_p(there), byref(queue))
    assert emulator().call("memlm_cuda_matmul_topk", *given) == NO_MEMORY
    processors = DEVICES[800][0]
    width = min(n, 2 * processors * 16384 // m)
    chunks = 1 + -(-width // 8192)
    # Sums of two blocks for each multiprocessor, at most, and their counters.
    parts = 2 * processors * (65536 + 256), 2 * m * k, width * m * 4, 8 * m * chunks * top
    assert queue.workspace_bytes <= sum(parts) + 256 * len(parts)
    if m == 512:
        assert queue.workspace_bytes < m * n * 4 / 8


def test_bad_input():
    x, packed, bias, _ = case("int4-g32", 40, 96, 6, torch.float16)

    def refused(match, x=x, mode="fast", top=1, packed=packed, **changes):
        with pytest.raises(RuntimeError, match=match):
            topk(x, packed, bias, mode, top=top, changes=changes)

    refused("k: got 0, accepted is 1 to n, 40", top=0)
    refused("k: got 41, accepted is 1 to n, 40", top=41)
    refused("mode: got 2 for 4 bits", mode="w8a8")
    refused(f"dtype: got f32 on compute capability {device.capability()}", x=x.float())
    refused("bits: got 3, accepted are 2, 4 and 8", bits=3)
    refused("m: got -1", m=-1)
    refused("x_stride: got 95, at least k = 96 is needed", x_stride=95)
    refused("x, values, indices: NULL", x=x[:0], m=3)
    many = integers(torch.zeros(3000, 32, dtype=torch.int64))
    refused("k: got 2049, the GPU's kernel finds up to 2048", x=x[:, :32], packed=many, top=2049)
    refused("a sparse matrix, a dense one is accepted", packed=random_case("2:4/int4-g32", 40, 96, 1, F32)[1])
