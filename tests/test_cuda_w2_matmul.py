"""w2_matmul on the emulated GPU: csrc/cuda/w2_matmul.cu."""

from .cuda_matmul_checks import WeightOnly


class TestW2Matmul(WeightOnly):
    OP = "w2_matmul"
    FORMATS = ["int2-g32", "int2a-g64", "ternary-g128"]
