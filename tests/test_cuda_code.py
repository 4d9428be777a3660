"""The CUDA kernels as nvcc compiles them: for every architecture, without a GPU."""

import ctypes
import re

import pytest

from . import cubin, device, gpu_code_table, gpu_limits

pytestmark = pytest.mark.skipif(device.wanted(), reason="needs no GPU")

FEW = 32  # bytes stored and loaded that may be spilled where all registers are taken
# More are: of sums that take half of 255 registers, and of 64 tokens in 128.
SPILLED = {
    r"attention_kernel<b?f16, 128, 32, false>": {120: 128},
    r"grad_kv_kernel<b?f16, 128, 3>": {100: 100, 120: 100},
    r"weight_only_kernel<(TwoOfFour|Unstructured)<.*, 8>": {100: 72, 120: 72},
}


def allowed(kernel) -> int:
    found = (of_arch for pattern, of_arch in SPILLED.items() if re.fullmatch(pattern, kernel.name))
    return next(found, {}).get(kernel.arch, FEW)


def check(row: gpu_code_table.Row) -> None:
    kernel, name = row.kernel, f"{row.kernel.name} sm_{row.kernel.arch}"
    assert kernel.spilled <= allowed(kernel), f"{name}: {kernel.spilled} bytes of registers in memory"
    assert kernel.registers <= gpu_limits.MOST_REGISTERS
    have = gpu_limits.ARCHS[kernel.arch]
    assert row.launch.shared_bytes + kernel.shared <= have.block_shared, name
    assert row.warps > 0, f"{name}: no multiprocessor can hold a block"
    if re.match("weight_only|w8a8|block_sparse|attention|logits|gradient", kernel.name):
        assert kernel.tensor_core(), f"{name}: no tensor cores"
    if row.source in ("w2_matmul.cu", "w4_matmul.cu", "w8_matmul.cu"):
        # Weights come 16 bytes at a time, past L1 and, from 8.0 on, past the registers.
        wide = r"LDGSTS\.E\.BYPASS\.128.*" if kernel.arch >= 80 else r"LDG\.E\.128.*"
        assert kernel.count(wide) >= 2, f"{name}: {kernel.count(wide)} copies of 16 bytes"


@cubin.needs_tools
def test_w4_matmul_for_sm_80():
    rows = gpu_code_table.rows(80, ["w4_matmul.cu"])
    assert len(rows) == 16  # two codecs, two types, four sizes of tile
    for row in rows:
        check(row)
        assert row.warps >= 16 and row.kernel.spilled == row.kernel.stack == 0, row.kernel.name
        # What the loop does for each product; a third of it was addresses once.
        loop = row.kernel.loop("HMMA")
        assert len(loop) / cubin.classes(loop)["tensor core"] < 45
    few = next(r.kernel for r in rows if r.kernel.name == "weight_only_kernel<Dense<f16, Integers<f16, 4> >, 1>")
    assert cubin.classes(few.loop("HMMA"))["conversion"] == 0  # codes become numbers without I2F


@cubin.needs_tools
@pytest.mark.gpu_proof
@pytest.mark.parametrize("arch", cubin.ARCHS)
def test_every_kernel(arch):
    for row in gpu_code_table.rows(arch):
        check(row)


@cubin.needs_nvcc
def test_the_library_loads_where_there_is_no_gpu(tmp_path):
    """What all launchers share, linked: it opens without a driver and says what is missing."""
    shared = [cubin.KERNELS / "host.cu", cubin.KERNELS / "rows.cu"]
    cubin.nvcc.build(tmp_path / "library.so", (80,), shared)
    library = ctypes.CDLL(str(tmp_path / "library.so"))
    library.memlm_cuda_last_error.restype = ctypes.c_char_p
    if library.memlm_cuda_supported() == 0:
        pytest.skip("there is a GPU")
    assert library.memlm_cuda_supported() == 3  # MEMLM_UNSUPPORTED
    assert b"no CUDA device with a driver for CUDA" in library.memlm_cuda_last_error()


@cubin.needs_nvcc
def test_chosen_architectures(monkeypatch):
    monkeypatch.setenv("MEMLM_CUDA_ARCHS", "90;80")
    assert cubin.nvcc.chosen_archs() == (80, 90)
    monkeypatch.setenv("MEMLM_CUDA_ARCHS", "none")
    assert cubin.nvcc.chosen_archs() == ()
    monkeypatch.delenv("MEMLM_CUDA_ARCHS")
    assert cubin.nvcc.chosen_archs() == cubin.ARCHS
    monkeypatch.setenv("MEMLM_CUDA_ARCHS", "80;81")
    with pytest.raises(ValueError, match="MEMLM_CUDA_ARCHS: got '81', accepted are none, all, or some of"):
        cubin.nvcc.chosen_archs()


def test_resident_warps():
    """Of the CUDA programming guide's own examples, and each limit in turn."""
    assert gpu_limits.resident_warps(80, 32, 256, 0) == 64
    assert gpu_limits.resident_warps(80, 128, 256, 0) == 16  # registers
    assert gpu_limits.resident_warps(80, 129, 256, 0) == 8
    assert gpu_limits.resident_warps(86, 32, 256, 0) == 48  # warps
    assert gpu_limits.resident_warps(75, 32, 32, 0) == 16  # blocks
    assert gpu_limits.resident_warps(86, 32, 256, 50 << 10) == 8  # shared memory, 1 KB of it reserved
    assert gpu_limits.resident_warps(86, 32, 256, 49 << 10) == 16
    assert gpu_limits.resident_warps(80, 32, 256, 164 << 10) == 0


def test_parsing():
    """A loop, a predicate, two kernels and names, as nvdisasm prints them."""
    text = (
        "\t.target\tsm_80\n\n\t.section\t.text._ZN5memlm4cuda1fINS_3f16EEEvi,\"ax\",@progbits\n"
        "        /*0000*/                   MOV R1, c[0x0][0x28] ;\n"
        ".L_x_1:\n"
        "        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;\n"
        "        /*0020*/                   HMMA.16816.F32 R4, R4, R8, R4 ;\n"
        "        /*0030*/               @P1 BRA `(.L_x_1) ;\n"
        "        /*0040*/                   EXIT ;\n"
        "\n\t.section\t.text._ZN5memlm4cuda1gEv,\"ax\",@progbits\n"
        "        /*0000*/                   EXIT ;\n"
    )
    report = (
        "ptxas info    : Compiling entry function '_ZN5memlm4cuda1fINS_3f16EEEvi' for 'sm_80'\n"
        "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, 24 bytes smem, 368 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_ZN5memlm4cuda1gEv' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, 352 bytes cmem[0]\n"
    )
    f, g = cubin.parse(text, report, 80)
    assert (f.name, f.registers, f.shared, f.stack, f.spilled) == ("f<f16>", 40, 24, 16, 12)
    assert (g.name, g.registers, g.shared, g.stack, g.spilled) == ("g", 8, 0, 0, 0)
    assert f.tensor_core() == ["HMMA.16816.F32"] and f.count(r"LDG\.E\.128.*") == 1
    assert [i.address for i in f.loop("HMMA")] == [0x10, 0x20, 0x30]
    with pytest.raises(ValueError, match="g: no loop around HMMA"):
        g.loop("HMMA")
