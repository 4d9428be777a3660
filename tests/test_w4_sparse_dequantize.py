"""w4_sparse_dequantize: every implementation against the formats' own, to the last bit."""

import pytest
import torch

import memlm
from memlm import ops, sparse_formats
from memlm.ops import implementations
from memlm.ops.w4_sparse_dequantize import pattern_number
from memlm.quantize import sparse_quantize
from memlm.sparse_formats import SparseFormat

from . import sparse

FORMATS = ["2:4/int4-g32", "2:4/nf4-g64", "unstructured/int4-g128", "unstructured/nf4-g32"]


def packed_of(name: str, n: int, k: int, density: float = 0.5):
    format = SparseFormat.parse(name)
    return sparse_quantize(sparse.random_weights(format, n, k, density), format)


def arguments(p, row: int, rows: int, dtype: torch.dtype) -> tuple:
    values = p.format.values
    kind = pattern_number(p.format.pattern), int(values.codebook == "nf")
    sizes = p.n, p.k, values.group
    return p.codes, p.places, p.starts, p.scales, *kind, *sizes, row, rows, dtype


@pytest.mark.parametrize("isa", memlm.isas())
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_specification(name, isa):
    memlm.set_isa(isa)
    for n, k, density in [(1, 1, 1.0), (17, 33, 0.0), (40, 300, 0.5), (35, 130, 1.0)]:
        p = packed_of(name, n, k, density)
        assert p.scales.dtype == torch.float16  # whose products with codes are exact
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = sparse_formats.dequantize(p, dtype)
            assert torch.equal(ops.dequantize(p, dtype), expected)
            for run in implementations("w4_sparse_dequantize").values():
                for row, rows in [(0, n), (n // 3, n - n // 3), (n - 1, 1), (n, 0)]:
                    part = run(*arguments(p, row, rows, dtype))
                    assert torch.equal(part, expected[row : row + rows])


@pytest.mark.parametrize("name", FORMATS[1:3])
def test_opcheck(name):
    op = torch.ops.memlm.w4_sparse_dequantize.default
    torch.library.opcheck(op, arguments(packed_of(name, 20, 96), 3, 9, torch.bfloat16))


def test_bad_input():
    p = packed_of("unstructured/int4-g32", 20, 96)
    for row, rows in [(-1, 3), (0, 21), (18, 3), (2**62, 2**62)]:
        with pytest.raises(RuntimeError, match="rows"):
            ops.w4_sparse_dequantize(p, row, rows)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.w4_sparse_dequantize(p, 0, 3, torch.float64)
