"""What the sparse matmuls of csrc/cuda are tested for on the emulated GPU, beside what all weight-only ones
are."""

import pytest
import torch

from memlm import sparse_formats

from . import device, emulator
from .cuda_matmul_checks import COMPLETE_ROWS, COMPLETE_SHAPES, ROWS, SHAPES, WeightOnly
from .gpu_matmul_checks import DENSITIES, GpuSparse, in_range
from .matmul_checks import off_by_one, random_case


class Sparse(GpuSparse, WeightOnly):
    @pytest.mark.parametrize("density", DENSITIES)
    def test_densities(self, some, density):
        for m in (1, 12):
            self.check_density(some, 40, 300, m, density, torch.float16)

    @pytest.mark.gpu_proof
    @pytest.mark.parametrize("density", DENSITIES)
    def test_every_density(self, format, dtype, density):
        for n, k in ((33, 2111), (130, 1057)):
            for m in (1, 9, 33):
                self.check_density(format, n, k, m, density, dtype)

    @pytest.mark.gpu_proof
    @pytest.mark.parametrize("shape", SHAPES + COMPLETE_SHAPES, ids=str)
    def test_every_shape(self, format, dtype, shape):
        small = shape[0] * shape[1] <= 1 << 15
        for m in ROWS + COMPLETE_ROWS if small else [1, 9, 33]:
            self.check(format, *shape, m, dtype)

    def test_memory(self, format):
        """W is read once, x and W are all that is read, and no bank of shared memory has to wait."""
        x, packed, _ = random_case(format, 128, 1024, 8, torch.float32)
        x = in_range(x, torch.float16)
        counts = emulator.emulator().counts(lambda: emulator.matmul(self.OP, x, packed, None))
        least = packed.nbytes + x.nbytes
        assert 32 * counts.distinct_read <= 1.03 * least
        if packed.format.pattern != "unstructured":  # whose codes lie where the bits say
            assert counts.shared_passes == counts.shared_least

    def test_turing(self, some):
        for m in (1, 33):
            self.check(some, 40, 300, m, torch.float16, arch=750)

    def test_bad_input(self, some):
        x, packed, _ = random_case(some, 20, 96, 6, torch.float16)

        def refused(match, packed=packed, x=x, **changes):
            with pytest.raises(RuntimeError, match=match):
                emulator.matmul(self.OP, x, packed, None, **changes)

        refused(f"dtype: got f32 on compute capability {device.capability()}", x=x.float())
        refused("swiglu: n / 2 must be a multiple of 16, n is 20", swiglu=True)
        parts = packed.tensors()
        moved = parts | {"codes": off_by_one(parts["codes"])}
        refused("must be 16-byte aligned", packed=sparse_formats.SparsePacked(packed.format, 20, 96, **moved))
        refused("pattern", packed=random_case(self.ANOTHER, 20, 96, 6, torch.float16)[1])
