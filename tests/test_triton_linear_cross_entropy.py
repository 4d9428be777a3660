"""linear_cross_entropy and its gradients in Triton's interpreter, against f64."""

import math

import pytest
import torch

from .cross_entropy_cases import (
    CASES, IGNORED, Case, Given, backward_in_f64, forward_in_f64, random_case, random_grad,
)  # fmt: skip
from .numerics import ROUNDOFF, assert_within
from .triton_interpreter import interpret

interpret()
from memlm import kernels  # noqa: E402
from memlm.kernels._targets import TARGETS  # noqa: E402
from memlm.kernels.linear_cross_entropy import SPACE, config_of  # noqa: E402

forward = kernels.implementation("linear_cross_entropy")
backward = kernels.implementation("linear_cross_entropy_backward")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow|All-NaN)")  # numpy's
DTYPES = [torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# More words than a share has, more k than a step.
LONG = [Case(40, 70, 1100, True, 0.1, 0.2)]


def check_forward(case: Case, dtype, config) -> None:
    given = random_case(case, dtype)
    losses, lse = forward(*given.arguments(), config=config)
    exact = forward_in_f64(given)
    assert_within(losses, exact.losses, exact.bound)
    assert_within(lse, exact.lse, exact.bound)
    assert not losses[given.targets == IGNORED].any()


def check_backward(case: Case, dtype, config, chunk: int) -> None:
    given = random_case(case, dtype)
    grad, lse = random_grad(given), forward_in_f64(given).lse.float()
    hidden, weight, bias, targets, *numbers = given.arguments()
    wanted = (True, True, case.bias)
    found = backward(grad, hidden, weight, bias, targets, lse, *numbers, *wanted, config=config, chunk=chunk)
    exact = backward_in_f64(given, grad, rounded=True)
    for i, (gradient, (value, bound)) in enumerate(zip(found, exact)):
        if gradient.numel():
            assert gradient.dtype == dtype
            if i == 0:  # the products of chunks are rounded
                p = forward_in_f64(given).p
                bound = bound + ROUNDOFF[dtype] * (grad.double().abs()[:, None] * (p + 1) @ weight.double().abs())
            assert_within(gradient, value, bound)


@dtypes
def test_losses_against_f64(dtype):
    for case in CASES:
        check_forward(case, dtype, SPACE[-1])


@dtypes
def test_gradients_against_f64(dtype):
    for case in CASES:
        for chunk in (1 << 20, 1):
            if chunk > 1 or case.v < 300:
                check_backward(case, dtype, SPACE[-1], chunk)


@pytest.mark.gpu_proof
@dtypes
@pytest.mark.parametrize("config", SPACE, ids=str)
def test_every_configuration(config, dtype):
    for case in CASES + LONG:
        check_forward(case, dtype, config)
        check_backward(case, dtype, config, 1 << 20)


def test_shares_of_the_vocabulary():
    check_forward(LONG[0], torch.float16, SPACE[-1])


def test_only_the_gradients_that_are_wanted():
    given = random_case(Case(9, 16, 20, True), torch.float16)
    hidden, weight, bias, targets, *numbers = given.arguments()
    lse = forward_in_f64(given).lse.float()
    found = backward(random_grad(given), hidden, weight, bias, targets, lse, *numbers, True, False, False, config=SPACE[-1])
    assert [g.shape for g in found] == [hidden.shape, (0,), (0,)]


def test_strides():
    given = random_case(Case(9, 40, 30, True), torch.float16)
    expected = forward(*given.arguments(), config=SPACE[-1])
    for turned in (Given(**{**vars(given), "hidden": given.hidden.T.contiguous().T}),
                   Given(**{**vars(given), "weight": given.weight.T.contiguous().T})):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(forward(*turned.arguments(), config=SPACE[-1]), expected))


def test_masked_words_nan_and_targets_that_do_not_exist():
    given = random_case(Case(6, 16, 300, True), torch.float16)
    given.bias[:200] = -math.inf
    given.targets.clamp_(min=200)
    exact = forward_in_f64(Given(given.hidden, given.weight[200:], given.bias[200:], given.targets - 200, 0.0))
    assert_within(forward(*given.arguments(), config=SPACE[-1])[0], exact.losses, exact.bound)
    given.hidden[2, 3] = math.nan
    given.targets[4] = 300
    losses, _ = forward(*given.arguments(), config=SPACE[-1])
    assert losses.isnan().tolist() == [False, False, True, False, True, False]


def test_f32_is_refused():
    given = random_case(Case(6, 16, 30), torch.float32)
    with pytest.raises(TypeError, match="hidden: got torch.float32, Triton kernels take f16 and bf16"):
        forward(*given.arguments(), config=SPACE[-1])


def test_every_target_has_room_for_one():
    small = {name for name, target in TARGETS.items() if config_of(target) is SPACE[1]}
    assert small == {"sm_75", "gfx1100"}
