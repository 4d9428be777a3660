"""What the sparse matmuls of kernels/ are tested for in Triton's interpreter, beside what all weight-only ones
are."""

import pytest
import torch

import memlm
from memlm import formats
from memlm.sparse_formats import SparseFormat, pack

from . import numerics, sparse
from .gpu_matmul_checks import DENSITIES, DTYPES, GpuSparse
from .matmul_checks import SHAPES, WEIGHT_NAMES, around_cases, quantized, random_case, weight_arguments
from .triton_matmul_checks import WeightOnly, kernels, matmul, split

from memlm.kernels._targets import TARGETS
from memlm.kernels._weight_only import pruned


def check_integers_exact(op: str, name: str, dtype, config):
    """With scales of 1, sums are integers below 2^24: exact at the extremes of codes, too."""
    format = SparseFormat.parse(name)
    values, (n, k, m) = format.values, (17, 128, 9)
    low, high, zero = values.codes.start, values.codes.stop - 1, formats.ZEROS[values.bits]
    code_dtype = torch.int8 if values.bits == 8 else torch.uint8
    generator = torch.Generator().manual_seed(0)
    most = 127 if dtype == torch.bfloat16 else 1  # f16 ends at 65,504
    x = torch.randint(-most, most + 1, (m, k), generator=generator)
    x[:, ::32] = most
    keep = sparse.mask(format, n, k, 0.5)
    scales = torch.ones(n, values.groups(k))
    offsets = None if values.symmetric else -zero * scales
    for q in (
        torch.randint(low, high + 1, (n, k), generator=generator),
        torch.full((n, k), low), torch.full((n, k), high),
    ):  # fmt: skip
        packed = pack(q.to(code_dtype), keep, scales, offsets, format)
        exact = (x @ ((q - zero) * keep).T).to(dtype)
        assert exact.isfinite().all()
        assert torch.equal(matmul(op, x.to(dtype), packed, None, config), exact)


class Sparse(GpuSparse, WeightOnly):
    """``INTEGERS``: formats whose sums are integers."""

    INTEGERS: list[str]
    FAST = [(1, 1, 1), (17, 33, 17), (40, 160, 3)]  # tails in each, more than one program and step of k
    # Without the largest, which takes minutes.
    CASES = [(n, k, m) for n, k in SHAPES[:-1] for m in ((1, 33) if k < 1000 else (1,))]

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "integers" in metafunc.fixturenames:
            metafunc.parametrize("integers", self.INTEGERS)

    def test_around(self, some):
        """Norm, swiglu and residual, each and together."""
        cases = around_cases(some, 40, 96, 9, DTYPES[self.SOME.index(some) % 2])
        together = max(cases, key=lambda case: len(case[2]))
        for config, some_cases in ((self.SPACE[0], cases), (split(self.SPACE), [together])):
            for x, packed, around in some_cases:
                y = matmul(self.OP, x, packed, None, config, **around)
                numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))

    @pytest.mark.gpu_proof
    def test_around_in_every_configuration(self, dtype, config):
        format = self.FORMATS[self.SPACE.index(config) % len(self.FORMATS)]
        for x, packed, around in around_cases(format, 48, 160, 41, dtype)[3:]:
            y = matmul(self.OP, x, packed, None, config, **around)
            numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))

    def test_every_target_has_a_configuration(self):
        for target in TARGETS.values():
            for bits in (2, 32):
                assert all(pruned(target, m, 32, bits, False, self.SPACE) for m in (1, 16, 33, 1000)), target

    @pytest.mark.parametrize("density", DENSITIES)
    def test_densities(self, some, density):
        self.check_density(some, 40, 70, 5, density, DTYPES[self.SOME.index(some) % 2])

    @pytest.mark.gpu_proof
    @pytest.mark.parametrize("density", DENSITIES)
    def test_every_density(self, format, dtype, density):
        for n, k in ((33, 2111), (130, 1057)):
            self.check_density(format, n, k, 9, density, dtype)

    def test_integers_are_exact(self, integers):
        for dtype in DTYPES:
            check_integers_exact(self.OP, integers, dtype, self.SPACE[0])

    def test_extremes(self):
        """Gates at which exp over- or underflows, zeros, and numbers that f16 can barely hold."""
        x = torch.zeros(3, 64, dtype=torch.float16)
        values = [-1e4, -100.0, -88.0, -87.0, 0.0, 87.0, 88.0, 1e4]
        w = torch.zeros(32, 64)
        w[:, 0] = torch.cat((torch.tensor(values).repeat(2), torch.ones(16)))
        both = quantized(w, self.SOME[0])
        x[0, 0], x[1, 0] = 1, 2.0**-24
        y = matmul(self.OP, x, both, None, self.SPACE[0], swiglu=True)
        numerics.assert_within(y, *numerics.exact_around(x, both, "mma", swiglu=True))
        assert torch.equal(y[2], torch.zeros_like(y[2]))

    def test_bad_input(self, some):
        x, packed, _ = random_case(some, 20, 96, 6, torch.float16)
        names = WEIGHT_NAMES[self.OP]

        def refused(error, match, x=x, **changes):
            given = dict(zip(names, weight_arguments(packed))) | changes
            with pytest.raises(error, match=match):
                kernels.implementation(self.OP)(
                    x, *(given[name] for name in names), None, False, None, 0.0, False, None,
                    config=self.SPACE[0],
                )  # fmt: skip

        refused(memlm.FormatError, "codes: got", codes=packed.codes.to(torch.int64))
        refused(memlm.FormatError, "places: got", places=packed.places[..., None])
        refused((memlm.FormatError, ValueError), "starts: got|scales: got|codes: got|shape", n=40)
        refused(ValueError, r"x: got shape \[6, 95\]", x=x[:, :95])
        refused(TypeError, "x: got torch.float64", x=x.double())
        refused(TypeError, "x: got torch.float32, Triton kernels take f16 and bf16", x=x.float())
