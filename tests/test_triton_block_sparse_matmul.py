"""block_sparse_matmul and its gradients in Triton's interpreter: kernels/block_sparse_matmul.py,
block_sparse_grad_x.py, block_sparse_grad_values.py."""

import pytest
import torch

from memlm import sparse_formats
from memlm.sparse_formats import SparsePacked

from . import block_sparse_gradients, numerics
from .gpu_matmul_checks import DTYPES
from .matmul_checks import quantized, random_case, weight_arguments
from .triton_matmul_checks import kernels, matmul
from .triton_sparse_checks import Sparse

from memlm.kernels import block_sparse_matmul

SPACE = block_sparse_matmul.SPACE


class TestBlockSparseMatmul(Sparse):
    OP = "block_sparse_matmul"
    FORMATS = [
        "block/int4a-g32", "block/int8-g32", "block/int2a-g32", "block/nf4-g32", "block/f32",
        "block/bf16",
    ]  # fmt: skip
    SOME = ["block/int4a-g32", "block/f32"]
    INTEGERS = ["block/int4-g32", "block/int8-g32", "block/int2a-g32"]
    SPACE = SPACE

    def test_not_finite(self, dtype):
        self.check_not_finite(self.SOME[DTYPES.index(dtype)], dtype)

    def test_floats_without_bf16_products(self, monkeypatch):
        monkeypatch.setattr(block_sparse_matmul, "is_turing", lambda device: True)
        for name in ("block/f32", "block/bf16"):
            self.check(name, 17, 96, 7, torch.float16)

    def test_floats_of_any_size(self):
        """Parts of weights and of x far from 1."""
        x, packed, _ = random_case("block/f32", 20, 96, 5, torch.float32)
        for size in (1e-20, 1e20):
            w = SparsePacked(packed.format, 20, 96, packed.codes * size, starts=packed.starts, places=packed.places)
            y = matmul(self.OP, x.bfloat16(), w, None, SPACE[0])
            numerics.assert_within(y, *numerics.exact_matmul(x.bfloat16(), w, None, "mma"))

    def test_every_part_of_floats_counts(self, dtype):
        """Where sums cancel, what is left are the products of the smallest parts that two numbers are cut
        into."""
        sign, a = torch.tensor([1.0, -1.0]).repeat(16), 3 * 2.0**-10  # beyond the 8 bits of 1 and 1.5
        thirds = sign[None], (1 + a + 3 * 2.0**-19 * sign).expand(16, 32)  # beyond the 8 bits of a
        lows = 1.5 * sign[None] + a, torch.full((16, 32), 1 + 255 * 2.0**-16)
        for x, w in (thirds, lows) if dtype == torch.float16 else (thirds,):
            packed = quantized(w, "block/f32")
            assert torch.equal(x.to(dtype).float(), x)
            y = matmul(self.OP, x.to(dtype), packed, None, SPACE[0])
            numerics.assert_within(y, *numerics.exact_matmul(x.to(dtype), packed, None, "mma"))

    def test_more_rows_than_a_grid_has(self):
        n = 16 * block_sparse_matmul.MOST_TILES + 1
        starts = torch.zeros(block_sparse_matmul.MOST_TILES + 2, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int32), torch.zeros(0, 32, 16)
        arguments = (starts, *none, None, None, 32, 0, n, 32, None, False, None, 0.0, False, None)
        with pytest.raises(kernels.UnsupportedError, match=f"n: got {n}"):
            kernels.implementation(self.OP)(torch.zeros(1, 32).half(), *arguments)


GRADIENT_SHAPES = [(1, 1, 1), (17, 33, 5), (100, 100, 70), (48, 64, 0)]


def gradient(name: str, *arguments) -> torch.Tensor:
    return kernels.implementation(f"block_sparse_{name}")(*arguments)


def check_gradient_of_x(name: str, n: int, k: int, m: int):
    packed, grad, expected = block_sparse_gradients.of_x(name, n, k, m)
    got = gradient("grad_x", grad, *weight_arguments(packed))
    assert got.dtype == torch.float32 and got.shape == (m, k)
    numerics.assert_within(got, *expected)


def check_gradient_of_values(n: int, k: int, m: int):
    packed, grad, x = block_sparse_gradients.of_values(n, k, m)
    got = gradient("grad_values", grad, x, packed.starts, packed.places, n, k)
    block_sparse_gradients.assert_values(got, packed, grad, x)


@pytest.mark.parametrize("name", TestBlockSparseMatmul.FORMATS)
def test_gradient_of_x(name):
    for n, k, m in GRADIENT_SHAPES:
        check_gradient_of_x(name, n, k, m)


def test_gradient_of_values():
    for n, k, m in GRADIENT_SHAPES:
        check_gradient_of_values(n, k, m)


def test_gradients_of_an_empty_matrix():
    """And of rows that do not lie one behind the other."""
    packed = random_case("block/f32", 40, 96, 1, torch.float32)[1]
    starts, none = torch.zeros_like(packed.starts), packed.places[:0]
    grad, x = torch.ones(40, 9).T, torch.ones(96, 9).T
    empty = gradient("grad_x", grad, starts, none, packed.codes[:0], None, None, 32, 0, 40, 96)
    assert torch.equal(empty, torch.zeros(9, 96))
    assert gradient("grad_values", grad, x, starts, none, 40, 96).shape == (0, 32, 16)
    weights = weight_arguments(packed)
    assert torch.equal(gradient("grad_x", grad, *weights), gradient("grad_x", grad.contiguous(), *weights))
    values = gradient("grad_values", grad, x, packed.starts, packed.places, 40, 96)
    stored = sparse_formats.positions(packed)[0][:, None, None] * 16 + torch.arange(16) < 40
    assert torch.equal(values, 9.0 * stored.expand_as(values))


def test_bad_gradients():
    packed = random_case("block/f32", 40, 100, 1, torch.float32)[1]
    weights, places = weight_arguments(packed), (packed.starts, packed.places, 40, 100)
    grad, x = torch.ones(3, 40), torch.ones(3, 100)
    for error, match, name, arguments in [
        (ValueError, r"grad: got shape \[3, 39\]", "grad_x", (grad[:, :39], *weights)),
        (TypeError, "grad: got torch.bfloat16", "grad_x", (grad.bfloat16(), *weights)),
        (ValueError, r"x: got shape \[3, 99\]", "grad_values", (grad, x[:, :99], *places)),
        (ValueError, "x: got 2 rows", "grad_values", (grad, x[:2], *places)),
        (TypeError, "x: got torch.float64", "grad_values", (grad, x.double(), *places)),
    ]:
        with pytest.raises(error, match=match):
            gradient(name, *arguments)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("name", TestBlockSparseMatmul.FORMATS)
def test_every_gradient(name):
    for n, k, m in [(700, 130, 65), (33, 1057, 129)]:
        check_gradient_of_x(name, n, k, m)
        check_gradient_of_values(n, k, m)
