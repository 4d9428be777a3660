"""dequantize and embedding in Triton's interpreter, against the formats' own, to the last bit."""

import pytest
import torch

from memlm import formats
from memlm.ops import _matmul

from .test_dequantize import DTYPES, FORMATS, arguments, packed_of
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402

dequantize = kernels.implementation("dequantize")
embedding = kernels.implementation("embedding")


@pytest.mark.parametrize("name", FORMATS)
def test_rows_equal_the_specification(name):
    for n, k in [(1, 1), (17, 33), (40, 300)]:
        for size in (1.0, 1e-6, 1e-12):  # f16 results of the latter two are subnormal or zero
            p = packed_of(name, n, k, size)
            for dtype in DTYPES:
                expected = formats.dequantize(p, dtype)
                assert torch.equal(dequantize(*arguments(p, 0, n, dtype)), expected)
                part = dequantize(*arguments(p, n // 3, n - n // 3, dtype))
                assert torch.equal(part, expected[n // 3 :])


@pytest.mark.parametrize("name", FORMATS)
def test_rows_by_index(name):
    p = packed_of(name, 40, 300)
    for dtype in DTYPES:
        for ids in (torch.tensor([[0, 39, 7], [16, 15, 0]]), torch.tensor(3), torch.zeros(0, dtype=torch.int64)):
            rows = embedding(ids, *_matmul.weight_arguments(p), dtype)
            assert torch.equal(rows, formats.dequantize(p, dtype)[ids])


def test_bad_input():
    p = packed_of("int4-g32", 20, 96)
    for row, rows in [(-1, 3), (0, 21), (18, 3)]:
        with pytest.raises(ValueError, match="rows: got"):
            dequantize(*arguments(p, row, rows, torch.float32))
    rows = embedding(torch.tensor([20, -1, 2**40, 3]), *_matmul.weight_arguments(p), torch.float32)
    assert rows[:3].isnan().all() and torch.equal(rows[3], formats.dequantize(p)[3])
