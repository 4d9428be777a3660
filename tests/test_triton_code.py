"""The Triton kernels as compiled for every target, without a GPU: tests/triton_code.py reads the code."""

import pytest

from memlm.kernels._targets import TARGETS

from .triton_code import account

# What multiplies matrices on each; Triton uses mma.sync on sm_90 and sm_100 for fewer than 64 rows.
UNITS = {
    "sm_75": set(), "sm_90": {"mma.sync", "wgmma"}, "sm_100": {"mma.sync", "tcgen05"},
    "gfx942": {"mfma"}, "gfx1100": {"wmma"},
}  # fmt: skip
# What ptxas spills although registers are left: bytes, of 32 rows by 64 features.
SPILLS = {("w8a8_matmul int8-row f16", "sm_90", "32x64"): 24}
OPERATIONS = ["w2_matmul", "w4_matmul", "w8_matmul", "w8a8_matmul", "quantize_rows", "dequantize", "embedding", "rms_norm", "add_splits", "add_int8_splits", "adamw_8bit", "linear_cross_entropy", "linear_cross_entropy_backward", "join_losses"]


def check(found, name: str) -> None:
    target = TARGETS[name]
    assert found
    for code in found:
        assert not code.error, code
        assert code.spills <= SPILLS.get((code.kernel, name, code.config), 0), code
        assert code.registers <= target.registers and code.shared <= target.shared, code
        units = UNITS.get(name, {"mma.sync"})
        multiplies = "matmul" in code.kernel or "cross_entropy" in code.kernel
        if multiplies and units:
            assert code.matrix and set(code.matrix) <= units, code
        if multiplies and target.backend == "cuda":
            assert code.wide, code


@pytest.mark.parametrize("target", ["sm_80"])
def test_some(target):
    found = account("w4_matmul int4-g128 f16|w8a8_matmul int8-row|quantize_rows row f16", [target])
    assert {code.kernel.split()[0] for code in found} == {"w4_matmul", "w8a8_matmul", "quantize_rows"}
    check(found, target)


@pytest.mark.gpu_proof
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_all(operation, target):
    check(account(f"^{operation} ", [target]), target)
