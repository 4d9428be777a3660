"""linear_cross_entropy on the emulated GPU: csrc/cuda/linear_cross_entropy.cu against f64."""

import ctypes
import math
from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p

import pytest
import torch

from . import emulated_torch
from .cross_entropy_cases import (
    CASES, IGNORED, Case, Given, forward_in_f64, logit_gradients_in_f64, random_case, random_grad,
)  # fmt: skip
from .emulator import DTYPES, emulator, pointer
from .matmul_checks import off_by_one
from .numerics import assert_within

archs = pytest.mark.parametrize("arch", [800, 750])
TYPES = [torch.float16, torch.bfloat16]
# Two tiles of tokens and of words, with ends within each; more k than the stages hold.
TILES = [Case(129, 264, 300, True, 0.1, 0.2), Case(16, 520, 140, size=20.0), Case(40, 8, 1000, True)]


class Args(Structure):
    """memlm_cuda_linear_cross_entropy_args"""

    _fields_ = [
        ("m", c_int64), ("k", c_int64), ("v", c_int64), ("hidden", c_void_p), ("weight", c_void_p),
        ("bias", c_void_p), ("hidden_stride", c_int64), ("weight_stride", c_int64), ("dtype", c_int),
        ("targets", c_void_p), ("ignore_index", c_int64), ("label_smoothing", c_float),
        ("losses", c_void_p), ("lse", c_void_p),
    ]  # fmt: skip


class Grads(Structure):
    """memlm_cuda_linear_cross_entropy_grads"""

    _fields_ = [("grad", c_void_p), ("first", c_int64), ("words", c_int64), ("grad_logits", c_void_p)]


def args_of(given: Given, losses, lse) -> Args:
    hidden, weight, bias, targets, ignore_index, smoothing = given.arguments()
    (m, k), v = hidden.shape, len(weight)
    return Args(
        m, k, v, pointer(hidden), pointer(weight), pointer(bias), hidden.stride(0) if m > 1 else k,
        weight.stride(0) if v > 1 else k, DTYPES[hidden.dtype], pointer(targets), ignore_index, smoothing,
        pointer(losses), pointer(lse),
    )  # fmt: skip


def forward(given: Given, arch: int = 800) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and lse ``[m]`` by the emulated kernels."""
    losses, lse = (torch.full((len(given.hidden),), math.nan) for _ in range(2))
    args = args_of(given, losses, lse)
    read = [given.hidden, given.weight, given.bias, given.targets]
    emulator(arch).run("memlm_cuda_linear_cross_entropy", byref(args), read=read, written=[losses, lse])
    return losses, lse


def backward(given: Given, grad, lse, first: int, words: int, arch: int = 800) -> torch.Tensor:
    """The gradients of some words' logits ``[m, words]`` by the emulated kernel."""
    out = torch.full((len(given.hidden), words), math.nan, dtype=given.hidden.dtype)
    args, grads = args_of(given, None, lse), Grads(pointer(grad), first, words, pointer(out))
    read = [given.hidden, given.weight, given.bias, given.targets, grad, lse]
    function = "memlm_cuda_linear_cross_entropy_backward"
    emulator(arch).run(function, byref(args), byref(grads), read=read, written=[out])
    return out


def check_backward(given: Given, arch: int = 800) -> None:
    """Of all words, and of some in the middle."""
    grad, lse, v = random_grad(given), forward_in_f64(given).lse.float(), len(given.weight)
    exact, bound = logit_gradients_in_f64(given, grad, rounded=True)
    for first, words in ((0, v), (v // 3, v // 2)):
        out = backward(given, grad, lse, first, words, arch)
        columns = slice(first, first + words)
        assert_within(out, exact[:, columns], bound[:, columns])


def check(given: Given, arch: int = 800) -> None:
    losses, lse = forward(given, arch)
    exact = forward_in_f64(given)
    assert_within(losses, exact.losses, exact.bound)
    assert_within(lse, exact.lse, exact.bound)
    assert not losses[given.targets == IGNORED].any()


@archs
def test_gradients_of_logits_against_f64(arch):
    for i, case in enumerate(CASES):
        check_backward(random_case(case, types_of(arch)[i % len(types_of(arch))]), arch)


def types_of(arch: int):
    return TYPES if arch >= 800 else TYPES[:1]


@archs
def test_losses_against_f64(arch):
    for i, case in enumerate(CASES):
        check(random_case(case, types_of(arch)[i % len(types_of(arch))]), arch)


@pytest.mark.gpu_proof
@archs
def test_losses_against_f64_in_all_types(arch):
    for dtype in types_of(arch):
        for case in CASES + TILES:
            check(random_case(case, dtype), arch)
            check_backward(random_case(case, dtype), arch)


def test_tiles():
    check(random_case(TILES[0], torch.float16))


def test_alignment_and_strides():
    """Rows that do not consist of pieces of 16 bytes, and rows that lie apart."""
    given = random_case(Case(20, 40, 30, True), torch.bfloat16)
    expected = forward(given)
    for which in ("hidden", "weight", "bias"):
        other = Given(**{**vars(given), which: off_by_one(getattr(given, which))})
        assert all(torch.equal(a, b) for a, b in zip(forward(other), expected))
    apart = torch.full((20, 48), math.nan, dtype=torch.bfloat16)
    apart[:, :40] = given.hidden
    other = Given(**{**vars(given), "hidden": apart[:, :40]})
    assert all(torch.equal(a, b) for a, b in zip(forward(other), expected))


def test_masked_words_nan_and_targets_that_do_not_exist():
    given = random_case(Case(6, 16, 300, True), torch.float16)
    given.bias[:200] = -math.inf
    given.targets.clamp_(min=200)
    check(Given(given.hidden, given.weight[200:], given.bias[200:], given.targets - 200, 0.0))
    losses, lse = forward(given)
    kept = Given(given.hidden, given.weight[200:], given.bias[200:], given.targets - 200, 0.0)
    exact = forward_in_f64(kept)
    assert_within(losses, exact.losses, exact.bound)
    given.hidden[2, 3] = math.nan
    given.targets[4] = 300
    assert forward(given)[0].isnan().tolist() == [False, False, True, False, True, False]


@pytest.mark.gpu_proof
def test_memory_traffic_and_banks():
    """No bank conflicts; every tile of both matrices comes once for each product with it."""
    given = random_case(Case(128, 256, 128), torch.float16)
    counts = emulator().counts(lambda: forward(given))
    assert counts.shared_passes == counts.shared_least
    assert counts.mmas == (128 // 16) * (128 // 8) * (256 // 16)
    matrices = 2 * 128 * 256 * 2 // 32
    others = 2 * 128 * 16 // 32 + 3 * 128 * 8 // 32  # parts; targets, by warps beside each other and at the end
    assert counts.read_sectors == matrices + others


def test_the_torch_op(tmp_path):
    emulated_torch.start("linear_cross_entropy", tmp_path)


def test_bad_input():
    given = random_case(Case(6, 16, 30), torch.float16)
    given.smoothing = 1.5
    with pytest.raises(RuntimeError, match="label_smoothing: got 1.5, accepted is 0 to 1"):
        forward(given)
    given.smoothing = 0.0
    with pytest.raises(RuntimeError, match="words: got 10 from 25 on, there are 30"):
        backward(given, torch.ones(6), torch.ones(6), 25, 10)
    with pytest.raises(RuntimeError, match="dtype: got f32"):
        forward(random_case(Case(6, 16, 30), torch.float32))
    with pytest.raises(RuntimeError, match="dtype: got bf16 on compute capability 7.5"):
        forward(random_case(Case(6, 16, 30), torch.bfloat16), 750)
    args = Args(5, 8, 0, dtype=ctypes.c_int(1))
    with pytest.raises(RuntimeError, match="m, v, k: got 5, 0, 8"):
        emulator().run("memlm_cuda_linear_cross_entropy", byref(args))
