"""block_sparse_matmul: every implementation, instruction set and kind of value against f64 and the
dense kernels, its gradients, and as a torch op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm import ops, sparse_formats
from memlm.quantize import sparse_quantize
from memlm.sparse_formats import FLOAT_DTYPES, SparseFormat, SparsePacked

from . import numerics, sparse
from .matmul_checks import random_case, run, weight_arguments
from .paths import PATHS, path_id
from .sparse_checks import Sparse, assert_op_refuses, before_unreadable_memory

OP = "block_sparse_matmul"


class TestBlockSparseMatmul(Sparse):
    OP = OP
    FORMATS = [
        "block/int4a-g32", "block/int8-g32", "block/int2a-g32", "block/nf4-g32", "block/f32",
        "block/bf16",
    ]  # fmt: skip
    SOME = ["block/int4a-g32", "block/bf16"]
    INTEGERS = ["block/int4-g32", "block/int4a-g32", "block/int8-g32"]

    def test_bad_input(self, some):
        check_bad_input(some)

    def test_not_finite(self, some, fast):
        """What is not finite stays in its own row, and in what is stored at its k."""
        for m in (3, 40):
            x, packed, bias = random_case(some, 64, 70, m, torch.float32)
            clean = run(OP, "cpp", x, packed, bias, fast)
            tiles, places = sparse_formats.positions(packed)
            reached = torch.zeros(4, 16, dtype=torch.bool)
            reached[tiles[places == 2]] = True  # k 69
            reached = reached.flatten()
            assert reached.any() and not reached.all()
            for value in (float("nan"), float("inf"), -float("inf")):
                bad = x.clone()
                bad[1, 69] = value
                y = run(OP, "cpp", bad, packed, bias, fast)
                others = [row for row in range(m) if row != 1]
                assert torch.equal(y[others], clean[others])
                assert torch.equal(y[1, ~reached], clean[1, ~reached])
                assert not torch.isfinite(y[1, reached]).any()


def check_bad_input(name: str):
    x, packed, bias = random_case(name, 64, 160, 6, torch.float32)
    tensors = packed.tensors()

    def refused(match, x=x, **changes):
        assert_op_refuses(OP, packed, match, x, **changes)

    places, starts = packed.places, packed.starts
    assert int(starts[1]) >= 2 and int(starts[-1]) > int(starts[1])
    for at, value in [(0, -1), (len(places) - 1, 5), (0, 5), (1, 2**31 - 1), (1, -(2**31))]:
        bad = places.clone()
        bad[at] = value
        refused("places: ", places=bad)
    bad = places.clone()
    bad[:2] = places[:2].flip(0)
    refused("places: must ascend", places=bad)
    bad[:2] = places[0]
    refused("places: must ascend", places=bad)
    for at, value in [(0, 1), (0, -1), (1, 99), (1, -1), (2, 0), (4, 2**62), (4, 0)]:
        bad = starts.clone()
        bad[at] = value
        refused("starts: must ascend", starts=bad)
    refused("starts: got", starts=starts[:-1])
    refused("starts: got", starts=starts.int())
    refused("places: got", places=places.long())
    refused("places: got|codes: got", places=places[:-1])
    refused("codes: got", codes=packed.codes[:-1])
    refused("codes: got", codes=packed.codes.to(torch.int32))
    refused("codes: must be contiguous", codes=packed.codes.transpose(1, 2).contiguous().transpose(1, 2))
    refused("bits: got 3", bits=3)
    refused("codes: got|got tensors|symmetric", bits=8)
    refused("starts: got|shape: got", n=100)
    refused("places: got|x: got", k=96, x=x[:, :96])
    refused("shape: got n=0", n=0)
    refused(r"x: got shape \[6, 159\]", x=x[:, :159])
    refused("x: got torch.float64", x=x.double())
    if "scales" in tensors:
        refused("got tensors", scales=None)
        refused("scales: got", scales=packed.scales[:-1])
        refused("offsets: got", offsets=packed.offsets.float())
    else:
        refused("got tensors", scales=torch.ones(len(places), 16))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["block/int4-g32", "block/f32"]), st.data())
def test_hostile_indices_are_refused_before_any_access(name, data):
    """Changed indices are refused by the op, or still those of a matrix; memory tells otherwise."""
    packed = random_case(name, 40, 100, 3, torch.float32)[1]
    parts = {key: before_unreadable_memory(t) for key, t in packed.tensors().items() if t.numel()}
    for _ in range(data.draw(st.integers(1, 2))):
        raw = parts[data.draw(st.sampled_from(["starts", "places"]))].view(torch.uint8)
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    weights = (
        parts["starts"], parts["places"], parts["codes"], parts.get("scales"), None,
        packed.format.bits, 0, 40, 100,
    )  # fmt: skip
    for m in (1, 33):
        x = torch.ones(m, 100)
        try:
            y = getattr(torch.ops.memlm, OP)(x, *weights, None, False, None, 0.0, False, None)
            g = torch.ops.memlm.block_sparse_grad_x(torch.ones(m, 40), *weights)
        except RuntimeError:
            with pytest.raises(memlm.FormatError):
                SparsePacked(packed.format, 40, 100, **parts)
            continue
        w = sparse_formats.dequantize(SparsePacked(packed.format, 40, 100, **parts))
        torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(g, torch.ones(m, 40) @ w, rtol=1e-4, atol=1e-4)


GRADIENT_SHAPES = [(1, 1, 1), (17, 33, 5), (100, 300, 40), (48, 64, 0)]


@pytest.mark.parametrize("path", PATHS, ids=path_id)
@pytest.mark.parametrize("name", ["block/f32", "block/bf16", "block/int4a-g32", "block/int8-g32"])
def test_gradient_of_x(name, path, restore_isa):
    """grad W in f32, over the stored blocks."""
    implementation, isa = path
    if isa:
        memlm.set_isa(isa)
    for n, k, m in GRADIENT_SHAPES:
        packed = random_case(name, n, k, 1, torch.float32)[1]
        grad = torch.randn(m, n, generator=torch.Generator().manual_seed(5))
        op = ops.implementations("block_sparse_grad_x")[implementation]
        got = op(grad, *weight_arguments(packed))
        assert got.dtype == torch.float32 and got.shape == (m, k)
        w, size = numerics.dequantize(packed), numerics.magnitudes(packed)
        bound = numerics.product_bound(grad.double().abs(), size)
        numerics.assert_within(got, grad.double() @ w, bound)


@pytest.mark.parametrize("path", PATHS, ids=path_id)
def test_gradient_of_values(path, restore_isa):
    """grad^T x, at the stored places alone."""
    implementation, isa = path
    if isa:
        memlm.set_isa(isa)
    for n, k, m in GRADIENT_SHAPES:
        packed = random_case("block/f32", n, k, 1, torch.float32)[1]
        generator = torch.Generator().manual_seed(5)
        grad, x = (torch.randn(m, size, generator=generator) for size in (n, k))
        given = (grad, x, packed.starts, packed.places, n, k)
        got = ops.implementations("block_sparse_grad_values")[implementation](*given)
        assert got.shape == packed.codes.shape
        stored = sparse_formats.unpack(packed)[1]
        assert not got.isnan().any()  # nor what stands beyond n or k, which nothing reads
        rows = SparsePacked(packed.format, n, k, got, starts=packed.starts, places=packed.places)
        exact = (grad.double().T @ x.double()).where(stored, torch.zeros(()))
        bound = numerics.product_bound(grad.double().abs().T, x.double().abs())
        numerics.assert_within(sparse_formats.dequantize(rows), exact, bound)


def test_gradients_as_torch_ops():
    packed = random_case("block/f32", 40, 100, 1, torch.float32)[1]
    weights, places = weight_arguments(packed), (packed.starts, packed.places, 40, 100)
    grad, x = torch.ones(3, 40), torch.ones(3, 100)
    torch.library.opcheck(torch.ops.memlm.block_sparse_grad_x.default, (grad, *weights))
    torch.library.opcheck(torch.ops.memlm.block_sparse_grad_values.default, (grad, x, *places))
    bad = packed.places.clone()
    bad[-1] = 4
    hostile = (packed.starts, bad, 40, 100)
    for name, arguments in [
        ("block_sparse_grad_x", (grad[:, :39], *weights)),
        ("block_sparse_grad_x", (grad.bfloat16(), *weights)),
        ("block_sparse_grad_x", (grad[0], *weights)),
        ("block_sparse_grad_x", (grad, packed.starts, bad, *weights[2:])),
        ("block_sparse_grad_values", (grad, x[:, :99], *places)),
        ("block_sparse_grad_values", (grad, x[:2], *places)),
        ("block_sparse_grad_values", (grad.double(), x, *places)),
        ("block_sparse_grad_values", (grad, x, *hostile)),
    ]:
        with pytest.raises(RuntimeError):
            getattr(torch.ops.memlm, name)(*arguments)
        with pytest.raises((ValueError, TypeError)):
            ops.implementations(name)["reference"](*arguments)


@pytest.mark.parametrize("values", ["f32", "bf16"])
def test_values_learn(values):
    """Gradients of values, through norm, bias, SwiGLU and residual, are those of a dense W at the
    stored places; blocks that are not stored stay away."""
    format = SparseFormat.parse(f"block/{values}")
    dtype = FLOAT_DTYPES[values]
    packed = sparse_quantize(sparse.random_weights(format, 64, 100), format)
    generator = torch.Generator().manual_seed(3)
    x, bias, norm = (torch.randn(*size, generator=generator) for size in ((7, 100), (64,), (100,)))
    residual = torch.randn(7, 32, generator=generator)
    seed = torch.randn(7, 32, generator=generator)
    codes = packed.codes.clone().requires_grad_()
    y = ops.block_sparse_matmul(
        x, packed.starts, packed.places, codes, None, None, format.bits, 64, 100, bias, False, norm,
        1e-5, True, residual,
    )  # fmt: skip
    y.backward(seed)
    w = sparse_formats.dequantize(packed).double().requires_grad_()
    h = torch.nn.functional.rms_norm(x.double(), (100,), norm.double(), 1e-5)
    gate, up = (h @ w.T + bias.double()).chunk(2, dim=-1)
    (torch.nn.functional.silu(gate) * up + residual.double()).backward(seed.double())
    assert codes.grad.dtype == dtype
    rows = SparsePacked(packed.format, 64, 100, codes.grad, starts=packed.starts, places=packed.places)
    stored = sparse_formats.unpack(packed)[1]
    got, expected = sparse_formats.dequantize(rows)[stored].double(), w.grad[stored]
    tolerance = {"f32": 1e-5, "bf16": 2.0**-8}[values]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-5 * float(expected.abs().max()))

    def loss(codes):
        parts = (packed.starts, packed.places, codes, None, None, format.bits, 64, 100)
        return ops.block_sparse_matmul(x, *parts).square().sum()

    torch._dynamo.reset()
    a, b = (packed.codes.clone().requires_grad_() for _ in range(2))
    loss(a).backward()
    torch.compile(loss, fullgraph=True)(b).backward()
    torch.testing.assert_close(a.grad, b.grad)
