"""What the sparse matmuls of csrc/cuda are tested for on the emulated GPU, beside what all weight-only ones
are."""

import pytest
import torch

from memlm import sparse_formats
from memlm.quantize import sparse_quantize
from memlm.sparse_formats import SparseFormat

from . import emulator, numerics, sparse
from .cuda_matmul_checks import COMPLETE_ROWS, COMPLETE_SHAPES, ROWS, SHAPES, WeightOnly, check, in_range
from .matmul_checks import off_by_one, quantized, random_case

DENSITIES = [0.0, 0.1, 0.5, 1.0]


def check_density(multiply, name: str, n: int, k: int, m: int, density: float, dtype):
    """A share of the weights, next to none and all included; with one row of tiles without any:
    ``multiply(x, packed, bias)``."""
    format = SparseFormat.parse(name)
    w = sparse.random_weights(format, n, k, density)
    w[16:32] = 0
    packed = sparse_quantize(w, format)
    generator = torch.Generator().manual_seed(1)
    x = in_range(torch.randn(m, k, generator=generator), dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    y = multiply(x, packed, bias)
    numerics.assert_within(y, *numerics.exact_matmul(x, packed, bias, "mma"))
    assert torch.equal(y[:, 16:32], bias[16:32].expand_as(y[:, 16:32]))
    if density == 0:
        assert torch.equal(y, bias.expand_as(y))


class Sparse(WeightOnly):
    """``SOME``: one format of each kind."""

    SOME: list[str]

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "some" in metafunc.fixturenames:
            metafunc.parametrize("some", self.SOME)

    def multiply(self, x, packed, bias):
        return emulator.matmul(self.OP, x, packed, bias)

    @pytest.mark.parametrize("density", DENSITIES)
    def test_densities(self, some, density):
        for m in (1, 12):
            check_density(self.multiply, some, 40, 300, m, density, torch.float16)

    @pytest.mark.gpu_proof
    @pytest.mark.parametrize("density", DENSITIES)
    def test_every_density(self, format, dtype, density):
        for n, k in ((33, 2111), (130, 1057)):
            for m in (1, 9, 33):
                check_density(self.multiply, format, n, k, m, density, dtype)

    @pytest.mark.gpu_proof
    @pytest.mark.parametrize("shape", SHAPES + COMPLETE_SHAPES, ids=str)
    def test_every_shape(self, format, dtype, shape):
        small = shape[0] * shape[1] <= 1 << 15
        for m in ROWS + COMPLETE_ROWS if small else [1, 9, 33]:
            check(self.OP, format, *shape, m, dtype)

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
            check(self.OP, some, 40, 300, m, torch.float16, arch=750)

    def test_f32_scales(self, some):
        """Weights far outside f16's range keep f32 scales."""
        format = SparseFormat.parse(some)
        packed = quantized(sparse.random_weights(format, 40, 96) * 1e6, some)
        assert packed.scales.dtype == torch.float32
        x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
        y = emulator.matmul(self.OP, x, packed, None)
        numerics.assert_within(y, *numerics.exact_matmul(x, packed, None, "mma"))

    def test_bad_input(self, some):
        x, packed, _ = random_case(some, 20, 96, 6, torch.float16)

        def refused(match, packed=packed, x=x, **changes):
            with pytest.raises(RuntimeError, match=match):
                emulator.matmul(self.OP, x, packed, None, **changes)

        refused("dtype: got f32 on compute capability 8.0", x=x.float())
        refused("swiglu: n / 2 must be a multiple of 16, n is 20", swiglu=True)
        parts = packed.tensors()
        moved = parts | {"codes": off_by_one(parts["codes"])}
        refused("must be 16-byte aligned", packed=sparse_formats.SparsePacked(packed.format, 20, 96, **moved))
        refused("pattern", packed=random_case(self.ANOTHER, 20, 96, 6, torch.float16)[1])
