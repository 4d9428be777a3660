"""w4_matmul on the emulated GPU: csrc/cuda/w4_matmul.cu."""

from .cuda_matmul_checks import WeightOnly


class TestW4Matmul(WeightOnly):
    OP = "w4_matmul"
    FORMATS = ["int4-g32", "int4-g128", "int4a-g32", "int4a-g64", "nf4-g32", "nf4-g64"]
