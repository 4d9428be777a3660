"""adamw_8bit in Triton's interpreter: what the specification says, to the last bit."""

import pytest
import torch

from memlm.dynamic_codes import BLOCK
from memlm.ops import implementations

from .adamw_cases import CASES, DTYPES, Case, equal, random_case
from .test_adamw_8bit import check_extremes
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402

adamw_8bit = kernels.implementation("adamw_8bit")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered")  # numpy's


def check(given) -> None:
    expected = given.clone()
    implementations("adamw_8bit")["reference"](*expected.tensors(), *given.numbers)
    adamw_8bit(*given.tensors(), *given.numbers)
    equal(given, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_specification(dtype):
    for case in CASES:
        check(random_case(case, dtype))


def test_every_code():
    given = random_case(Case(256 * BLOCK), torch.float32)
    given.exp_avg.copy_(torch.arange(256 * BLOCK) % 256)
    given.exp_avg_sq.copy_(torch.arange(256 * BLOCK) // 256)
    check(given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype):
    check_extremes(lambda given: adamw_8bit(*given.tensors(), *given.numbers), dtype)


def test_strided_gradient():
    given = random_case(Case(300), torch.float32)
    expected = given.clone()
    given.grad = torch.stack((given.grad, given.grad), 1)[:, 0]
    implementations("adamw_8bit")["reference"](*expected.tensors(), *given.numbers)
    adamw_8bit(*given.tensors(), *given.numbers)
    given.grad = expected.grad
    equal(given, expected)


def test_bad_input():
    given = random_case(Case(300), torch.float32)
    with pytest.raises(TypeError, match="exp_avg: got torch.int8"):
        adamw_8bit(*given.tensors()[:2], given.exp_avg.view(torch.int8), *given.tensors()[3:], *given.numbers)
