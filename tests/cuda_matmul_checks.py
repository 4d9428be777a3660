"""What the weight-only matmuls of csrc/cuda are tested for on the emulated GPU."""

import pytest
import torch

from memlm.formats import Packed

from . import emulator
from .gpu_matmul_checks import GpuWeightOnly, in_range
from .matmul_checks import off_by_one, random_case

# n, k: one of each, tails in both, several stages of k, k that blocks share out.
SHAPES = [(1, 1), (17, 33), (100, 300), (40, 2112)]
ROWS = [1, 7, 8, 13, 32, 70]  # each number of token tiles, tails
COMPLETE_SHAPES = [(16, 32), (5, 129), (33, 2111), (130, 4128)]
COMPLETE_ROWS = [2, 9, 16, 17, 31, 33, 64, 65, 129]


class WeightOnly(GpuWeightOnly):
    def run(self, x, packed, bias, **around) -> torch.Tensor:
        return emulator.matmul(self.OP, x, packed, bias, **around)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_fp64(self, format, dtype, shape):
        for m in ROWS if shape == (17, 33) else ROWS[::3]:
            self.check(format, *shape, m, dtype)

    @pytest.mark.gpu_proof
    @pytest.mark.parametrize("shape", SHAPES + COMPLETE_SHAPES, ids=str)
    def test_every_shape(self, format, dtype, shape):
        for m in ROWS + COMPLETE_ROWS:
            self.check(format, *shape, m, dtype)

    def test_around(self, format, dtype):
        self.check_around(format, 40, 96, 9, dtype)

    @pytest.mark.gpu_proof
    def test_around_many_rows(self, format, dtype):
        self.check_around(format, 100, 1056, 41, dtype)

    def test_turing(self, format):
        for m in (1, 33):
            self.check(format, 40, 300, m, torch.float16, arch=750)
        x, packed, _ = random_case(format, 16, 32, 1, torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype: got bf16 on compute capability 7.5; accepted are f16"):
            self.run(x, packed, None, arch=750)

    def test_same_in_any_schedule(self):
        x, packed, bias = random_case(self.FORMATS[0], 40, 2112, 3, torch.float32)
        x, bias = in_range(x, torch.float16), bias.half()
        assert len({emulator.matmul(self.OP, x, packed, bias).numpy().tobytes() for _ in range(3)}) == 1

    def test_bad_input(self):
        x, packed, bias = random_case(self.FORMATS[0], 20, 96, 6, torch.float16)

        def refused(match, packed=packed, x=x, **changes):
            with pytest.raises(RuntimeError, match=match):
                emulator.matmul(self.OP, x, packed, None, **changes)

        refused(r"dtype: got f32 on compute capability \d+.\d", x=x.float())
        refused("swiglu: n / 2 must be a multiple of 16, n is 20", swiglu=True)
        parts = {name: off_by_one(t) for name, t in packed.tensors().items()}
        refused("must be 16-byte aligned", packed=Packed(packed.format, 20, 96, **parts))
