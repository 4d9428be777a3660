"""w8_matmul in Triton's interpreter: kernels/w8_matmul.py."""

from .triton_matmul_checks import ManyRows, WeightOnly


class TestW8Matmul(ManyRows, WeightOnly):
    OP = "w8_matmul"
    FORMATS = ["int8-row", "int8-g32", "int8-g64", "int8-g128"]
