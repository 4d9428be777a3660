"""The Triton kernels as compiled for every target, without a GPU: tests/triton_code.py reads the code."""

import functools
import re

import pytest

from memlm.kernels._targets import TARGETS

from . import device
from .triton_code import Code, account
from .triton_code_table import table
from .triton_specimens import specimens

pytestmark = pytest.mark.skipif(device.wanted(), reason="needs no GPU")

# What multiplies matrices on each; Triton uses mma.sync on sm_90 and sm_100 for fewer than 64 rows.
UNITS = {
    "sm_75": set(), "sm_90": {"mma.sync", "wgmma"}, "sm_100": {"mma.sync", "tcgen05"},
    "gfx942": {"mfma"}, "gfx1100": {"wmma"},
}  # fmt: skip
# Bytes that may be put aside before a loop and fetched behind it, some twenty instructions of a program: ptxas does
# so where it keeps registers for one more block of threads, and gives them where it is told to.  Attention, which
# takes all registers where heads are large, puts more aside.
ONCE, ONCE_OF_ATTENTION = 16, 72
# Attention takes all registers where heads are large, and may spill a few in loops: bytes, or registers of AMD's.
# Which configuration is fastest is measured.
FEW = {"cuda": 48, "hip": 20}
SPILLS = {
    ("paged_attention int4 f16", "sm_75", "256 16 rows 8 warps 1 stages"): 8,
    ("attention_backward kv options bf16", "sm_90", "256 32x16 8 warps"): 56,
    ("paged_attention bf16 f16", "sm_120", "128 32 rows 4 warps 2 stages"): 48,
}
# Kernels that multiply matrices; of f32 no unit does.
MULTIPLY = re.compile(r".*matmul|linear_cross_entropy|(paged_)?attention .* b?f16|attention_backward k?[qv] .* b?f16")
OPERATIONS = sorted({specimen.name.split()[0] for specimen in specimens(TARGETS["sm_80"])})


def is_narrow(code: Code, target) -> bool:
    """Whether all that threads load is less than 16 bytes: a step of paged attention, for 8 warps; and 16 rows
    of 32 k of a matmul, for 4, which do not read what comes behind the product where its sums are split."""
    if "paged" in code.kernel:
        return code.warps == 8
    rows = code.config.startswith("16x") and "split" in code.config
    return rows and ("-g32" in code.kernel or target.step == 32)


def check(found, name: str) -> None:
    target = TARGETS[name]
    assert found
    for code in found:
        assert not code.error, code
        attends = code.kernel.startswith("attention")
        in_loops = SPILLS.get((code.kernel, name, code.config), FEW[target.backend] if attends else 0)
        once = ONCE_OF_ATTENTION if attends else ONCE
        assert code.spills <= (in_loops if code.looped else once), code
        assert code.registers <= target.registers and code.shared <= target.shared, code
        units = UNITS.get(name, {"mma.sync"})
        if MULTIPLY.match(code.kernel) and units:
            assert code.matrix and set(code.matrix) <= units, code
        if MULTIPLY.match(code.kernel) and target.backend == "cuda" and not is_narrow(code, target):
            assert code.wide, code


@pytest.mark.parametrize("target", ["sm_80"])
def test_some(target):
    found = account("w4_matmul int4-g128 f16|w8a8_matmul int8-row|quantize_rows row f16", [target])
    assert {code.kernel.split()[0] for code in found} == {"w4_matmul", "w8a8_matmul", "quantize_rows"}
    check(found, target)


@functools.cache
def all_of(target: str) -> list[Code]:
    """Takes minutes."""
    return account("", [target])


# A target's tests run in one process, which has its kernels compiled.
targets = pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.xdist_group(t)) for t in TARGETS])


@pytest.mark.gpu_proof
@pytest.mark.parametrize("operation", OPERATIONS)
@targets
def test_all(operation, target):
    check([code for code in all_of(target) if code.kernel.split()[0] == operation], target)


def test_table():
    def code(config, target, registers, spills=0, looped=False):
        return Code("w4_matmul f16", target, config, 4, registers, spills, 2048, {"mma.sync": 8}, 2, "", looped)

    written = table([
        code("a", "sm_80", 90), code("b", "sm_80", 120, 8, True), code("a", "sm_90", 80), code("a", "sm_86", 90, 16),
    ])  # fmt: skip
    assert written.splitlines()[2:] == [
        "| `w4_matmul f16` | 1–2 | 90–120 r, 2 KB, mma.sync, **8 spilled** | 80 r, 2 KB, mma.sync "
        "| 90 r, 2 KB, mma.sync, 16 put aside |"
    ]
