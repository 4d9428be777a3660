"""w2_matmul: every implementation, instruction set and format against f64, and as a torch op."""

import pytest

import memlm

from . import matmul_checks as checks

OP = "w2_matmul"
FORMATS = ["int2-g32", "int2-g128", "int2a-g64", "ternary-g64"]
PATHS = [("reference", None), *(("cpp", isa) for isa in memlm.isas())]
both_modes = pytest.mark.parametrize("fast", [True, False], ids=["fast", "accurate"])
one_of_each = pytest.mark.parametrize("format", ["int2-g32", "int2a-g64"])


@both_modes
@pytest.mark.parametrize("path", PATHS, ids=lambda p: "-".join(filter(None, p)))
@pytest.mark.parametrize("format", FORMATS)
def test_against_fp64(format, path, fast, restore_isa):
    checks.check_against_fp64(OP, format, *path, fast)


@pytest.mark.parametrize("isa", memlm.isas())
@pytest.mark.parametrize("format", ["int2-g32", "int2-g128", "int2a-g32"])
def test_integers_are_exact(format, isa, restore_isa):
    checks.check_integers_exact(OP, format, 0, 3, isa)


@both_modes
@one_of_each
def test_numbers(format, fast):
    checks.check_f32_scales(OP, format, fast)
    checks.check_not_finite(OP, format, fast)
    checks.check_small_activations(OP, format)


@both_modes
@one_of_each
def test_independent_of_threads(format, fast, restore_threads):
    checks.check_threads(OP, format, fast)


@one_of_each
def test_shapes_and_strides(format):
    checks.check_shapes_and_strides(OP, format)


@both_modes
@one_of_each
def test_opcheck(format, fast):
    checks.check_torch_op(OP, format, fast)


@one_of_each
def test_torch(format):
    checks.check_gradient(OP, format)
    checks.check_autocast(format)


def test_compile():
    checks.check_compile("int2a-g64")


@one_of_each
def test_bad_input(format):
    checks.check_bad_input(OP, format)


@both_modes
@pytest.mark.parametrize("path", PATHS, ids=lambda p: "-".join(filter(None, p)))
@one_of_each
def test_with_the_layers_around_it(format, path, fast, restore_isa):
    checks.check_around(OP, format, *path, fast)


@one_of_each
def test_layers_around_it_at_extremes_and_their_gradients(format):
    checks.check_around_extremes(OP, format)
    checks.check_around_gradient(OP, format)
