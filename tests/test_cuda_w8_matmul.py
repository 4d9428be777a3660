"""w8_matmul on the emulated GPU: csrc/cuda/w8_matmul.cu."""

from .cuda_matmul_checks import WeightOnly


class TestW8Matmul(WeightOnly):
    OP = "w8_matmul"
    FORMATS = ["int8-row", "int8-g32", "int8-g64", "int8-g128"]
