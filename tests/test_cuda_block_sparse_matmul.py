"""block_sparse_matmul on the emulated GPU: csrc/cuda/block_sparse_matmul.cu."""

import pytest
import torch

from memlm import sparse_formats

from . import emulator
from .cuda_matmul_checks import in_range
from .cuda_sparse_checks import Sparse
from .matmul_checks import random_case


class TestBlockSparseMatmul(Sparse):
    OP = "block_sparse_matmul"
    FORMATS = [
        "block/int4-g32", "block/int4a-g32", "block/int8-g32", "block/int2a-g32", "block/nf4-g32",
        "block/f32", "block/bf16",
    ]  # fmt: skip
    SOME = ["block/int4a-g32", "block/int8-g32", "block/int2-g32", "block/nf4-g32"]
    ANOTHER = "2:4/int4-g32"

    def test_not_finite(self, dtype):
        """What is not finite stays in its own row, and in what is stored at its k."""
        for name in ("block/int4a-g32", "block/f32"):
            x, packed, bias = random_case(name, 64, 70, 9, torch.float32)
            x, bias = in_range(x, dtype), bias.to(dtype)
            clean = emulator.matmul(self.OP, x, packed, bias)
            tiles, places = sparse_formats.positions(packed)
            reached = torch.zeros(4, 16, dtype=torch.bool)
            reached[tiles[places == 2]] = True  # k 69
            reached = reached.flatten()
            assert reached.any() and not reached.all()
            for value in (float("nan"), float("inf")):
                bad = x.clone()
                bad[1, 69] = value
                y = emulator.matmul(self.OP, bad, packed, bias)
                others = [row for row in range(9) if row != 1]
                assert torch.equal(y[others], clean[others])
                assert torch.equal(y[1, ~reached], clean[1, ~reached])
                assert not y[1, reached].isfinite().any()

    @pytest.mark.parametrize("name, bits", [("block/f32", 32), ("block/bf16", 16)])
    def test_floats_on_turing(self, name, bits):
        x, packed, _ = random_case(name, 20, 96, 6, torch.float16)
        with pytest.raises(RuntimeError, match=f"bits: got {bits} on compute capability 7.5"):
            emulator.matmul(self.OP, x, packed, None, arch=750)
