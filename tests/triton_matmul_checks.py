"""What the weight-only matmuls of kernels/ are tested for in Triton's interpreter."""

import functools

import pytest
import torch

from .gpu_matmul_checks import DTYPES, GpuWeightOnly, check_many_rows, in_range
from .matmul_checks import SHAPES, arguments, random_case
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.kernels import _unpacked, _weight_only  # noqa: E402
from memlm.kernels._weight_only import SPACE  # noqa: E402

# n, k, rows: tails in each, more than one step of k.
FAST = [(1, 1, 1), (17, 33, 7), (100, 300, 17)]
ROWS = [1, 2, 7, 16, 33]


def split(space):
    """The first of these configurations whose programs share out k."""
    return next(config for config in space if config.kwargs["SPLITS"] > 1)


def matmul(op: str, x, packed, bias, config=None, **around) -> torch.Tensor:
    return kernels.implementation(op)(*arguments(x, packed, bias, False, **around), config=config)


class ManyRows:
    """Of operations that leave many rows to torch."""

    def test_many_rows(self, format, dtype):
        check_many_rows(functools.partial(matmul, self.OP), format, 40, 96, dtype)

    def test_many_rows_by_panels(self, monkeypatch):
        monkeypatch.setattr(_unpacked, "PANEL_BYTES", 0)
        monkeypatch.setattr(_unpacked, "PANEL_UNIT", 16)
        check_many_rows(functools.partial(matmul, self.OP), self.FORMATS[0], 40, 96, torch.float16)


class WeightOnly(GpuWeightOnly):
    """``SPACE``: its configurations; ``FAST``: n, k and rows of the fast subset; ``CASES``: of the complete one."""

    SPACE, FAST = SPACE, FAST
    CASES = [(n, k, m) for n, k in SHAPES for m in (ROWS if k < 1000 else ROWS[-1:])]

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "config" in metafunc.fixturenames:
            metafunc.parametrize("config", self.SPACE, ids=str)

    def run(self, x, packed, bias, config=None, **around) -> torch.Tensor:
        """``config``: by default the first."""
        return matmul(self.OP, x, packed, bias, config or self.SPACE[0], **around)

    def test_against_fp64(self, format, dtype):
        for case in self.FAST:
            self.check(format, *case, dtype, [True], config=self.SPACE[0])
            self.check(format, *case, dtype, [False], config=split(self.SPACE))

    def turn(self, format, dtype) -> int:
        """A number for each format and type: with which configuration they begin, so that each shape meets as
        many configurations as there are of both."""
        return self.FORMATS.index(format) * len(DTYPES) + DTYPES.index(dtype)

    @pytest.mark.gpu_proof
    def test_every_shape(self, format, dtype):
        """The configurations take turns."""
        for at, case in enumerate(self.CASES, self.turn(format, dtype)):
            self.check(format, *case, dtype, config=self.SPACE[at % len(self.SPACE)])

    def test_around(self, format, dtype):
        for config in (self.SPACE[0], split(self.SPACE)):
            self.check_around(format, 40, 96, 9, dtype, config=config)

    @pytest.mark.gpu_proof
    def test_around_in_every_configuration(self, dtype, config):
        """The formats take turns."""
        format = self.FORMATS[self.SPACE.index(config) % len(self.FORMATS)]
        self.check_around(format, 100, 300, 41, dtype, config=config)

    def test_shapes(self, dtype):
        x, packed, _ = random_case(self.FORMATS[0], 40, 96, 6, torch.float32)
        x = in_range(x, dtype)
        expected = self.run(x, packed, None)
        assert torch.equal(self.run(x.T.contiguous().T, packed, None), expected)
        assert torch.equal(self.run(x.view(2, 3, 96), packed, None), expected.view(2, 3, 40))
        assert self.run(x[:0], packed, None).shape == (0, 40)

    def test_small_steps(self, format, monkeypatch):
        """As devices with few registers take k."""
        monkeypatch.setattr(_weight_only, "most_step", lambda device: 32)
        self.check(format, 17, 300, 3, torch.float16, [True])

    def test_f32_is_refused(self):
        x, packed, _ = random_case(self.FORMATS[0], 20, 96, 6, torch.float32)
        with pytest.raises(TypeError, match="x: got torch.float32, Triton kernels take f16 and bf16"):
            self.run(x, packed, None)
