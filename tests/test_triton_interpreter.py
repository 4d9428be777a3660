"""The interpreter as tests/triton_interpreter.py puts it right: bf16 against torch's."""

import pytest
import torch

from . import device
from .triton_interpreter import interpret, on_device

interpret()
pytestmark = pytest.mark.skipif(device.wanted(), reason="the interpreter is for machines without a GPU")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def arithmetic_kernel(a, b, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "subtract":
        z = x - y
    elif OPERATION == "multiply":
        z = x * y
    else:
        z = tl.maximum(x, y)
    tl.store(out + at, z)


@triton.jit
def cast_kernel(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at).to(out.dtype.element_ty))


@triton.jit
def bits_kernel(codes, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, (tl.load(codes + at) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136)


@triton.jit
def masked_kernel(a, out, length, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at, at < length, -1.5), at < length + 1)


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    place = at[:, None] * SIZE + at[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))


def numbers(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(256, generator=generator) * 10 ** torch.randn(256, generator=generator)).bfloat16()


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "maximum"])
def test_arithmetic(operation):
    a, b = numbers(1), numbers(2)
    out = torch.full_like(a, float("nan"))
    arithmetic_kernel[(1,)](a, b, out, OPERATION=operation, SIZE=256)
    assert torch.equal(out, getattr(torch, operation)(a, b))


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.int32], ids=str)
def test_casts_round_to_nearest_even(other):
    wide = (torch.randn(256, generator=torch.Generator().manual_seed(3)) * 300).to(other)
    for source, target in ((wide, torch.bfloat16), (wide.bfloat16(), other)):
        out = torch.zeros(256, dtype=target)
        cast_kernel[(1,)](source, out, SIZE=256)
        assert torch.equal(out, source.to(target))


def test_ties():
    """Halfway between neighbours, which lie 2^-7 apart: cutting digits off would give 1 for both."""
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    out = torch.zeros(2, dtype=torch.bfloat16)
    cast_kernel[(1,)](ties, out, SIZE=2)
    assert out.tolist() == [1.0, 1 + 2 * 2.0**-7]


def test_numbers_made_of_bits():
    out = torch.zeros(16, dtype=torch.bfloat16)
    bits_kernel[(1,)](torch.arange(16, dtype=torch.int32), out, SIZE=16)
    assert out.tolist() == list(range(-8, 8))


def test_masks():
    a, out = numbers(4)[:16].clone(), torch.full((16,), float("nan")).bfloat16()
    masked_kernel[(1,)](a, out, 9, SIZE=16)
    assert torch.equal(out[:9], a[:9]) and out[9] == -1.5 and out[10:].isnan().all()


def test_products_are_summed_in_f32():
    """Within the bound on f32 sums, which sums in bf16 would miss a thousandfold."""
    a, b = (numbers(seed).view(16, 16) for seed in (5, 6))
    out = torch.full((16, 16), float("nan"))
    dot_kernel[(1,)](a, b, out, SIZE=16)
    error = (out.double() - a.double() @ b.double()).abs()
    assert (error <= 16 * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()


def test_on_device():
    """As the kernels' tests run on a GPU: tensors go there and back, what is written to as well."""
    seen = []

    def kernel(pool, tails, k, v, rows, lengths, tables, tail_of, type, block_tokens):
        seen.append(pool)
        pool.fill_(7)

    def product(*args):
        return args[0] + 1

    there = {"kv_append": kernel, "dequantize": product}
    pool, k = torch.zeros(2, 3), torch.zeros(1)
    assert on_device(there.get, "cpu")("kv_append")(pool, None, k, k, k, k, k, None, 0, 64) is None
    assert bool((pool == 7).all()) and seen[0].data_ptr() != pool.data_ptr()
    assert torch.equal(on_device(there.get, "cpu")("dequantize")(pool), pool + 1)
