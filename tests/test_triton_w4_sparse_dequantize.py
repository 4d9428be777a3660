"""w4_sparse_dequantize in Triton's interpreter, against the formats' own, to the last bit."""

import pytest
import torch

from memlm import sparse_formats

from .matmul_checks import off_by_one
from .test_w4_sparse_dequantize import FORMATS, arguments, packed_of
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402

dequantize = kernels.implementation("w4_sparse_dequantize")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(name: str, n: int, k: int, density: float) -> None:
    p = packed_of(name, n, k, density)
    assert p.scales.dtype == torch.float16  # whose products with codes are exact
    for dtype in DTYPES:
        expected = sparse_formats.dequantize(p, dtype)
        parts = [(n // 3, n - n // 3), (n - 1, 1), (n, 0)] if dtype == torch.float32 else []
        for row, rows in [(0, n), *parts]:
            part = dequantize(*arguments(p, row, rows, dtype))
            assert part.dtype == dtype and torch.equal(part, expected[row : row + rows])


@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_specification(name):
    for n, k, density in [(1, 1, 1.0), (17, 33, 0.0), (40, 140, 0.5)]:
        check(name, n, k, density)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("name", FORMATS)
def test_every_shape(name):
    for n, k, density in [(35, 130, 1.0), (40, 300, 0.5), (130, 1057, 0.1), (33, 2111, 0.9), (5, 4128, 0.5)]:
        check(name, n, k, density)


def test_codes_anywhere():
    """Codes that begin between 32-bit words, as those of rows of a larger matrix do."""
    p = packed_of("unstructured/int4-g32", 40, 96)
    parts = p.tensors() | {"codes": off_by_one(p.codes)}
    moved = sparse_formats.SparsePacked(p.format, 40, 96, **parts)
    expected = sparse_formats.dequantize(p)
    assert torch.equal(dequantize(*arguments(moved, 0, 40, torch.float32)), expected)
    for part, rows in zip(sparse_formats.split_rows(p, [16, 24]), (slice(0, 16), slice(16, 40))):
        assert torch.equal(dequantize(*arguments(part, 0, part.n, torch.float32)), expected[rows])


def test_f32_scales():
    p = packed_of("unstructured/nf4-g32", 20, 96)
    parts = p.tensors() | {"scales": p.scales.float() * 1e6}
    p = sparse_formats.SparsePacked(p.format, 20, 96, **parts)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(*arguments(p, 0, 20, dtype)), sparse_formats.dequantize(p, dtype))


def test_bad_input():
    p = packed_of("unstructured/int4-g32", 20, 96)
    for row, rows in [(-1, 3), (0, 21), (18, 3), (2**62, 2**62)]:
        with pytest.raises(ValueError, match="rows: got"):
            dequantize(*arguments(p, row, rows, torch.float32))
    with pytest.raises(TypeError, match="dtype: got torch.float64"):
        dequantize(*arguments(p, 0, 3, torch.float64))
