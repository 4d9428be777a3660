"""The gradients of block_sparse_matmul on GPUs: cases, and what results are held against."""

import torch

from memlm import sparse_formats
from memlm.sparse_formats import SparsePacked

from . import numerics
from .matmul_checks import random_case


def of_x(name: str, n: int, k: int, m: int) -> tuple[SparsePacked, torch.Tensor, tuple]:
    """W, whose numbers beyond n are NaN; grad; and exact grad W over the stored blocks, with its bound."""
    packed = random_case(name, n, k, 1, torch.float32)[1]
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(5))
    bound = numerics.product_bound(grad.double().abs(), numerics.magnitudes(packed))
    exact = grad.double() @ numerics.dequantize(packed)
    if packed.format.is_float and n % 16:
        beyond = packed.codes.clone()
        beyond[sparse_formats.positions(packed)[0] == packed.tiles - 1, :, n % 16 :] = float("nan")
        packed = SparsePacked(packed.format, n, k, beyond, starts=packed.starts, places=packed.places)
    return packed, grad, (exact, bound)


def of_values(n: int, k: int, m: int) -> tuple[SparsePacked, torch.Tensor, torch.Tensor]:
    """W, grad and x."""
    generator = torch.Generator().manual_seed(5)
    grad, x = (torch.randn(m, size, generator=generator) for size in (n, k))
    return random_case("block/f32", n, k, 1, torch.float32)[1], grad, x


def assert_values(got: torch.Tensor, packed: SparsePacked, grad: torch.Tensor, x: torch.Tensor) -> None:
    """grad^T x, at the stored places alone; zeros beyond n and k."""
    n, k = packed.n, packed.k
    assert got.dtype == torch.float32 and got.shape == packed.codes.shape
    tiles, places = sparse_formats.positions(packed)
    beyond = (16 * tiles[:, None, None] + torch.arange(16) >= n) | (
        32 * places[:, None, None] + torch.arange(32)[:, None] >= k
    )
    assert torch.equal(got[beyond], torch.zeros(int(beyond.sum())))
    whole = SparsePacked(packed.format, n, k, got, starts=packed.starts, places=packed.places)
    stored = sparse_formats.unpack(packed)[1]
    exact = (grad.double().T @ x.double()).where(stored, torch.zeros(()))
    bound = numerics.product_bound(grad.double().abs().T, x.double().abs())
    numerics.assert_within(sparse_formats.dequantize(whole), exact, bound)
