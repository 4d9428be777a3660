"""linear_cross_entropy against f64, loss and gradients; its memory."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from memlm import ops
from memlm.ops import linear_cross_entropy as public
from memlm.ops._registry import implementations

from .cross_entropy_cases import (
    CASES, DTYPES, IGNORED, Case, backward_in_f64, forward_in_f64, random_case, random_grad,
)  # fmt: skip
from .numerics import assert_within

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# More columns, and more rows, than are there at once.
BLOCKS = [Case(7, 24, 9000, True, 0.2, 0.2), Case(2500, 8, 70, ignored=0.1)]
op = torch.ops.memlm.linear_cross_entropy
op_backward = torch.ops.memlm.linear_cross_entropy_backward


@dtypes
def test_losses_against_f64(dtype):
    for case in CASES + BLOCKS:
        given = random_case(case, dtype)
        losses, lse = op(*given.arguments())
        exact = forward_in_f64(given)
        assert losses.dtype == lse.dtype == torch.float32
        assert_within(losses, exact.losses, exact.bound)
        assert_within(lse, exact.lse, exact.bound)
        assert not losses[given.targets == IGNORED].any()


@dtypes
def test_gradients_against_f64(dtype):
    for case in CASES + BLOCKS:
        given = random_case(case, dtype)
        grad, lse = random_grad(given), op(*given.arguments())[1]
        hidden, weight, bias, targets, *numbers = given.arguments()
        found = op_backward(grad, hidden, weight, bias, targets, lse, *numbers, True, True, case.bias)
        for gradient, (exact, bound) in zip(found, backward_in_f64(given, grad)):
            if gradient.numel():
                assert gradient.dtype == dtype
                assert_within(gradient, exact, bound)
        nothing = op_backward(grad, hidden, weight, bias, targets, lse, *numbers, False, False, False)
        assert [g.numel() for g in nothing] == [0, 0, 0]


def test_gradcheck():
    """Of the formulas, in f64 by differences."""
    given = random_case(Case(6, 5, 11, True, 0.15, 0.3), torch.float64)
    inputs = [t.requires_grad_() for t in (given.hidden, given.weight, given.bias)]

    def losses(hidden, weight, bias):
        return op(hidden, weight, bias, given.targets, IGNORED, given.smoothing)[0]

    assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_torch_has_it(reduction):
    """Shapes, reductions and gradients of what it stands in for."""
    given = random_case(Case(24, 20, 50, True, 0.1, 0.3), torch.float32)
    shape, results = (2, 3, 4), []
    for ours in (True, False):
        hidden, weight, bias = (t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias))
        x, targets = hidden.view(*shape, -1), given.targets.view(shape)
        if ours:
            loss = public(x, weight, targets, bias, reduction=reduction, label_smoothing=0.1)
        else:
            logits = F.linear(x, weight, bias).movedim(-1, 1)
            loss = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.1)
        (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
        results.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_that_are_wanted():
    given = random_case(Case(8, 20, 50), torch.float32)
    hidden = given.hidden.requires_grad_()
    public(hidden, given.weight, given.targets).backward()
    assert hidden.grad.abs().sum() > 0 and given.weight.grad is None


def test_all_ignored():
    given = random_case(Case(8, 20, 50, ignored=1.1), torch.float32)
    hidden = given.hidden.requires_grad_()
    arguments = (hidden, given.weight, given.targets)
    assert public(*arguments).isnan()  # as torch's mean over nothing
    loss = public(*arguments, reduction="sum")
    loss.backward()
    assert loss == 0 and not hidden.grad.any()
    empty = public(torch.ones(0, 4), torch.ones(3, 4), torch.ones(0, dtype=torch.int64), reduction="none")
    assert empty.shape == (0,)


def test_infinite_bias_masks_a_word():
    """And where all words of a block of columns are masked, the running maximum begins later."""
    given = random_case(Case(4, 8, 9000, True), torch.float32)
    given.bias[:5000] = -math.inf
    given.targets.clamp_(min=5000)
    losses, _ = op(*given.arguments())
    kept = given.weight[5000:].double(), given.bias[5000:].double()
    expected = F.cross_entropy(F.linear(given.hidden.double(), *kept), given.targets - 5000, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_row():
    given = random_case(Case(4, 8, 50), torch.float32)
    given.hidden[2, 3] = math.nan
    assert op(*given.arguments())[0].isnan().tolist() == [False, False, True, False]


def test_targets_that_do_not_exist():
    """Where nobody waits to see them, they give NaN."""
    given = random_case(Case(4, 8, 50), torch.float32)
    given.targets[1], given.targets[3] = 50, -1
    losses, _ = implementations("linear_cross_entropy")["reference"](*given.arguments())
    assert losses.isnan().tolist() == [False, True, False, True]


def test_autocast_compile_and_opcheck():
    given = random_case(Case(6, 16, 40, True), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = public(given.hidden, given.weight, given.targets, given.bias)
    parts = (given.hidden.bfloat16(), given.weight.bfloat16(), given.targets, given.bias.bfloat16())
    assert torch.equal(loss, public(*parts)) and loss.dtype == torch.float32
    hidden = given.hidden.requires_grad_()
    torch.library.opcheck(op.default, (hidden, *given.arguments()[1:]))
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, given.weight, given.targets), public(hidden, given.weight, given.targets))


def test_memory():
    """Forward and backward of 1,024 tokens over 60,000 words: 245 MB of logits that are never there."""
    code = """
import resource, torch
from memlm.ops import linear_cross_entropy
hidden = torch.randn(1024, 64, requires_grad=True)
weight = torch.randn(60000, 64, requires_grad=True)
targets = torch.randint(60000, (1024,))
linear_cross_entropy(hidden[:64], weight, targets[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, targets).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6  # 16 MB three times, gradients of 16 MB, what malloc keeps


BAD = {
    "hidden: got torch.float64": lambda g: {"hidden": g["hidden"].double()},
    "weight: got list": lambda g: {"weight": [1.0]},
    "weight: got torch.float16 on cpu, expected torch.float32": lambda g: {"weight": g["weight"].half()},
    "weight: got shape .40, 15., expected .v, 16.": lambda g: {"weight": g["weight"][:, :15]},
    "bias: got shape .39., expected .40.": lambda g: {"bias": g["bias"][:39]},
    "targets: got torch.int32": lambda g: {"targets": g["targets"].int()},
    "targets: got shape .5., expected .6.": lambda g: {"targets": g["targets"][:5]},
    "targets: got 40, accepted are 0 to 39 and -100": lambda g: {"targets": g["targets"] * 0 + 40},
    "reduction: got 'max'": lambda g: {"reduction": "max"},
    "label_smoothing: got 1.5, accepted is 0 to 1": lambda g: {"label_smoothing": 1.5},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    given = random_case(Case(6, 16, 40, True), torch.float32)
    good = {"hidden": given.hidden, "weight": given.weight, "targets": given.targets, "bias": given.bias}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.linear_cross_entropy(**(good | BAD[message](good)))


def test_implementations():
    assert list(implementations("linear_cross_entropy")) == ["reference", "cpp"]
