"""adamw_8bit: the step and the rounding that the specification says, to the last bit on every instruction
set; the specification itself against f64."""

import math

import pytest
import torch

import memlm
from memlm import dynamic_codes, ops
from memlm.dynamic_codes import BLOCK, codebook
from memlm.ops._registry import implementations

from .adamw_cases import CASES, DTYPES, Case, equal, random_case, step_in_f64
from .numerics import ROUNDOFF, SMALLEST

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def levels_from_the_paper(signed: bool) -> list[float]:
    """Bit by bit, from the drawing: a byte's leading zeros are decades, the bits behind the first one a
    fraction, read at the middle of its piece."""
    found = [0.0, 1.0]
    for bits in range(1, 128) if signed else range(2, 256):
        text = f"{bits:07b}" if signed else f"{bits:08b}"
        zeros = len(text) - len(text.lstrip("0"))
        fraction = text[zeros + 1 :]
        share = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
        found.append(10.0**-zeros * (0.1 + 0.9 * share))
    return sorted(found + ([-x for x in found if 0 < x < 1] if signed else []))


@signs
def test_levels(signed):
    levels = codebook(signed).levels
    assert levels.tolist() == sorted(set(levels.tolist())) and len(levels) == 256
    torch.testing.assert_close(levels.double(), torch.tensor(levels_from_the_paper(signed)).double(), rtol=2**-23, atol=0)


@signs
def test_rounds_to_the_nearest_level(signed):
    """And to the farther one only where both are equally far but for 2^-17 x: of five f32 operations on
    numbers of up to 2^(b + 1) steps, each 0.9 * 2^-b of a decade's end, which is at most 10 x."""
    generator = torch.Generator().manual_seed(1)
    levels = codebook(signed).levels.double()
    middles = (levels[1:] + levels[:-1]) / 2
    x = torch.cat([
        10.0 ** (torch.rand(20_000, generator=generator) * -9), levels.abs(), middles.abs(),
        middles.abs() * (1 + 2.0**-18), middles.abs() * (1 - 2.0**-18), torch.tensor([0.0, 1.0, 1.0 + 2.0**-23]),
    ]).float()  # fmt: skip
    x = torch.cat([x, -x]) if signed else x
    codes = dynamic_codes.encode(x, signed)
    distance = (x[:, None].double() - levels).abs()
    if not signed:  # what is above 0 stays so
        distance[x > 0, 0] = math.inf
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 2.0**-17 * x.abs().double()).all()
    assert torch.equal(dynamic_codes.encode(levels.float(), signed), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_against_f64(dtype):
    """Parameter and moments of a step: each operation rounds once."""
    u = 2.0**-24
    for case in CASES:
        given = random_case(case, dtype)
        exact = step_in_f64(given)
        p, _, codes_m, absmax_m, codes_v, absmax_v = result = given.clone().tensors()
        implementations("adamw_8bit")["reference"](*result[:6], *given.numbers)
        # Factors and products round: 4 for the decayed one, 12 for the step, of moments with 6 and 8 each.
        bound = 6 * u * exact.decayed.abs() + 40 * u * exact.step_size.abs()
        bound += ROUNDOFF[dtype] * (exact.param.abs() + bound) + SMALLEST[dtype]
        assert ((p.double() - exact.param).abs() <= bound).all()
        for codes, absmax, moment, signed, size in (
            (codes_m, absmax_m, exact.m, True, exact.size_m), (codes_v, absmax_v, exact.v, False, exact.v),
        ):  # fmt: skip
            off = 6 * u * size  # by which the f32 moment may be off
            largest = torch.nn.functional.pad(moment.abs().view(-1), (0, -moment.numel() % BLOCK)).view(-1, BLOCK).amax(1)
            worst = torch.nn.functional.pad(off.view(-1), (0, -off.numel() % BLOCK)).view(-1, BLOCK).amax(1)
            assert ((absmax.double() - largest).abs() <= worst + 2.0**-149).all()
            scale = largest.repeat_interleave(BLOCK)[: moment.numel()]
            x = (moment.view(-1) / scale).nan_to_num(0)
            levels = codebook(signed).levels.double()
            distance = (x[:, None] - levels).abs()
            if not signed:
                distance[x > 0, 0] = math.inf
            chosen = distance.gather(1, codes.view(-1).long()[:, None])[:, 0]
            slack = 2.0**-17 * x.abs() + 2 * (off.view(-1) / scale).nan_to_num(0) + 2 * u * x.abs()
            assert (chosen <= distance.amin(1) + slack).all()


@pytest.mark.parametrize("isa", memlm.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_specification(dtype, isa, restore_isa, restore_threads):
    memlm.set_isa(isa)
    for case in CASES:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            given = random_case(case, dtype)
            expected, got = given.clone(), given.clone()
            implementations("adamw_8bit")["reference"](*expected.tensors(), *given.numbers)
            ops.adamw_8bit(*got.tensors(), *given.numbers)
            equal(got, expected)
            assert not torch.equal(got.param, given.param) or not got.param.numel()


def test_every_code():
    """All codes of both moments, in every place of a block's decades."""
    count = 256 * BLOCK
    given = random_case(Case(count), torch.float32)
    given.exp_avg.copy_(torch.arange(count) % 256)
    given.exp_avg_sq.copy_(torch.arange(count) // 256)
    expected, got = given.clone(), given.clone()
    implementations("adamw_8bit")["reference"](*expected.tensors(), *given.numbers)
    ops.adamw_8bit(*got.tensors(), *given.numbers)
    equal(got, expected)


def extremes(dtype):
    """Numbers that are not finite, that overflow when squared, that vanish, and zeros: a block each."""
    largest = torch.finfo(dtype).max
    values = [math.nan, math.inf, -math.inf, largest, 1e-20, 1e-30, torch.finfo(dtype).smallest_normal, 0.0]
    given = random_case(Case(len(values) * BLOCK, moments="zero"), dtype)
    given.grad.zero_()
    for i, value in enumerate(values):
        given.grad[i * BLOCK + 3] = value
    return given, values


def check_extremes(run, dtype) -> None:
    """Of an implementation ``run(case)``, which changes it."""
    given, values = extremes(dtype)
    got, expected = given.clone(), given.clone()
    run(got)
    implementations("adamw_8bit")["reference"](*expected.tensors(), *given.numbers)
    equal(got, expected)
    for i, value in enumerate(values):
        block = slice(i * BLOCK, (i + 1) * BLOCK)
        finite = math.isfinite(value)
        squares = torch.tensor(value, dtype=torch.float32) ** 2
        assert got.exp_avg_absmax[i].isfinite() == finite
        assert got.exp_avg_sq_absmax[i].isfinite() == bool(squares.isfinite() | (value != value)) or not finite
        assert got.param[block].isfinite().sum() == BLOCK - (not finite)  # of this step only those
        if value == 0.0:
            assert (got.exp_avg[block] == 127).all() and not got.exp_avg_sq[block].any()
            assert not got.exp_avg_absmax[i] and not got.exp_avg_sq_absmax[i]
    got.grad.zero_()
    run(got)
    assert got.param[: 3 * BLOCK].isnan().all()  # from the next step on all of the block


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype):
    check_extremes(lambda case: ops.adamw_8bit(*case.tensors(), *case.numbers), dtype)


def test_no_second_moment_above_0_becomes_0():
    """So that a step stays bounded where one number of a block is far larger than the others."""
    given = random_case(Case(BLOCK, moments="zero"), torch.float32)
    given.grad.fill_(1e-6)
    given.grad[7] = 1.0
    ops.adamw_8bit(*given.tensors(), *given.numbers)
    assert given.exp_avg_sq.min() >= 1
    before = given.param.clone()
    given.grad.zero_()
    ops.adamw_8bit(*given.tensors(), *given.numbers[:-1], 2)
    assert ((given.param - before).abs() <= 4 * given.numbers[0]).all()


def test_strided_gradient_and_opcheck():
    given = random_case(Case(300), torch.float32)
    tensors, shape = list(given.tensors()), (20, 15)
    for i in (0, 1, 2, 4):
        tensors[i] = tensors[i].view(shape)
    expected = [t.clone() for t in tensors]
    ops.adamw_8bit(*expected, *given.numbers)
    tensors[1] = tensors[1].T.contiguous().T
    torch.library.opcheck(torch.ops.memlm.adamw_8bit.default, (*tensors, *given.numbers))
    ops.adamw_8bit(*tensors, *given.numbers)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected))


BAD = {
    "param: got torch.float64": lambda t: {0: t[0].double()},
    "grad: got torch.float16, expected a tensor of torch.float32": lambda t: {1: t[1].half()},
    "grad: got shape .299.": lambda t: {1: t[1][:299]},
    "exp_avg: got torch.int8": lambda t: {2: t[2].view(torch.int8)},
    "exp_avg_absmax: got shape .1.": lambda t: {3: t[3][:1]},
    "exp_avg_sq: must be contiguous": lambda t: {4: torch.zeros(600, dtype=torch.uint8)[::2]},
    "exp_avg_sq_absmax: got torch.float64": lambda t: {5: t[5].double()},
    "lr: got -1.0": lambda t: {6: -1.0},
    "beta1: got 1.0, accepted is 0 to below 1": lambda t: {7: 1.0},
    "beta2: got nan": lambda t: {8: math.nan},
    "eps: got inf": lambda t: {9: math.inf},
    "weight_decay: got -0.1": lambda t: {10: -0.1},
    "step: got 0, they count from 1": lambda t: {11: 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    given = random_case(Case(300), torch.float32)
    arguments = [*given.tensors(), *given.numbers]
    before = [t.clone() for t in given.tensors()]
    for i, value in BAD[message](given.tensors()).items():
        arguments[i] = value
    for run in (ops.adamw_8bit, implementations("adamw_8bit")["reference"]):
        with pytest.raises((TypeError, ValueError), match=message):
            run(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(given.tensors(), before))
