"""adamw_8bit on the emulated GPU: csrc/cuda/adamw_8bit.cu, to the last bit as the specification says."""

import ctypes
from ctypes import Structure, byref, c_double, c_int, c_int64, c_void_p

import pytest
import torch

from memlm.dynamic_codes import BLOCK
from memlm.ops._registry import implementations

from . import emulated_torch
from .adamw_cases import CASES, Case, Given, equal, random_case
from .emulator import DTYPES, emulator, pointer
from .matmul_checks import off_by_one
from .test_adamw_8bit import check_extremes

archs = pytest.mark.parametrize("arch", [800, 750])


class Args(Structure):
    """memlm_adamw_8bit_args"""

    _fields_ = [
        ("count", c_int64), ("param", c_void_p), ("grad", c_void_p), ("dtype", c_int), ("exp_avg", c_void_p),
        ("exp_avg_absmax", c_void_p), ("exp_avg_sq", c_void_p), ("exp_avg_sq_absmax", c_void_p),
        ("lr", c_double), ("beta1", c_double), ("beta2", c_double), ("eps", c_double),
        ("weight_decay", c_double), ("step", c_int64), ("threads", c_int),
    ]  # fmt: skip


def adamw_8bit(given: Given, arch: int = 800) -> None:
    """A step in place by the emulated kernel."""
    p, grad, *moments = given.tensors()
    args = Args(p.numel(), pointer(p), pointer(grad), DTYPES[p.dtype], *map(pointer, moments), *given.numbers)
    emulator(arch).run("memlm_cuda_adamw_8bit", byref(args), read=[grad], written=[p, *moments])


def check(given: Given, arch: int = 800) -> None:
    expected = given.clone()
    implementations("adamw_8bit")["reference"](*expected.tensors(), *given.numbers)
    adamw_8bit(given, arch)
    equal(given, expected)


@archs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_specification(dtype, arch):
    for case in CASES:
        if case.count < 40 * BLOCK:
            check(random_case(case, dtype), arch)


@pytest.mark.gpu_proof
@archs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_specification_at_length(dtype, arch):
    """More blocks than are begun at once, on 68 or 108 multiprocessors: each takes several."""
    check(random_case(Case(4 * 8 * 110 * BLOCK + 1000), dtype), arch)
    check(random_case(Case(40 * BLOCK + 100, 1000), dtype), arch)


def test_every_code():
    given = random_case(Case(256 * BLOCK), torch.float32)
    given.exp_avg.copy_(torch.arange(256 * BLOCK) % 256)
    given.exp_avg_sq.copy_(torch.arange(256 * BLOCK) // 256)
    check(given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype):
    check_extremes(adamw_8bit, dtype)


@pytest.mark.parametrize("which", ["param", "grad", "exp_avg", "exp_avg_absmax", "exp_avg_sq"])
def test_alignment(which):
    """Each array may begin anywhere."""
    given = random_case(Case(2 * BLOCK + 9), torch.float16)
    setattr(given, which, off_by_one(getattr(given, which)))
    check(given)


def test_traffic():
    """Every sector once: parameter and gradient, the codes and their magnitudes."""
    blocks = 64
    for dtype in DTYPES:
        given = random_case(Case(blocks * BLOCK), dtype)
        counts = emulator().counts(lambda: adamw_8bit(given))
        size = given.param.element_size()
        read, written = blocks * BLOCK * (2 * size + 2), blocks * BLOCK * (size + 2)
        magnitudes = 2 * blocks  # a sector for each, which a warp reads or writes alone
        assert counts.read_sectors == read // 32 + magnitudes
        assert counts.write_sectors == written // 32 + magnitudes


def test_the_torch_op(tmp_path):
    emulated_torch.start("adamw_8bit", tmp_path)


def test_bad_input():
    given = random_case(Case(300), torch.float32)
    for i, value, name in ((0, -1.0, "lr"), (2, 1.0, "beta2"), (3, float("nan"), "eps"), (5, 0, "step")):
        numbers = list(given.numbers)
        numbers[i] = value
        with pytest.raises(RuntimeError, match=f"{name}: accepted are finite numbers from 0 on"):
            adamw_8bit(Given(*given.tensors(), tuple(numbers)))
    args = Args(-1, threads=1)
    with pytest.raises(RuntimeError, match="count: got -1"):
        emulator().run("memlm_cuda_adamw_8bit", byref(args))
    args = Args(5, dtype=0, beta1=ctypes.c_double(0.5), step=1)
    with pytest.raises(RuntimeError, match="param, grad, exp_avg, exp_avg_sq or one of their magnitudes: NULL"):
        emulator().run("memlm_cuda_adamw_8bit", byref(args))
