"""dequantize: every implementation against the formats' own, to the last bit."""

import pytest
import torch

import memlm
from memlm import formats, ops
from memlm.ops import _matmul, implementations
from memlm.quantize import quantize_weight

FORMATS = ["int8-row", "int8-g64", "int4-g32", "int4-g128", "int4a-g64", "nf4-g64", "int2a-g32", "ternary-g64"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed_of(name, n, k, size=1.0):
    g = torch.Generator().manual_seed(0)
    return quantize_weight(torch.randn(n, k, generator=g) * size, name)


def arguments(p, row, rows, dtype):
    return *_matmul.weight_arguments(p), row, rows, dtype


@pytest.mark.parametrize("isa", memlm.isas())
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_specification(name, isa, restore_isa):
    memlm.set_isa(isa)
    for n, k in [(1, 1), (17, 33), (40, 300)]:
        for size in (1.0, 1e-6, 1e-12):  # f16 results of the latter two are subnormal or zero
            p = packed_of(name, n, k, size)
            for dtype in DTYPES:
                expected = formats.dequantize(p, dtype)
                for run in implementations("dequantize").values():
                    assert torch.equal(run(*arguments(p, 0, n, dtype)), expected)
                    part = run(*arguments(p, n // 3, n - n // 3, dtype))
                    assert torch.equal(part, expected[n // 3 :])
                assert torch.equal(ops.dequantize(p, dtype), expected)


def test_opcheck():
    p = packed_of("int4a-g64", 20, 96)
    torch.library.opcheck(torch.ops.memlm.dequantize.default, arguments(p, 3, 9, torch.bfloat16))


def test_bad_input():
    p = packed_of("int4-g32", 20, 96)
    with pytest.raises(TypeError, match="dtype: got torch.int32"):
        ops.dequantize(p, torch.int32)
    op = torch.ops.memlm.dequantize.default
    for row, rows in [(-1, 3), (0, 21), (18, 3), (2**62, 2**62)]:
        with pytest.raises(RuntimeError, match="rows"):
            op(*arguments(p, row, rows, torch.float32))
