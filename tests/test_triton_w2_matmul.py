"""w2_matmul in Triton's interpreter: kernels/w2_matmul.py."""

from .triton_matmul_checks import ManyRows, WeightOnly


class TestW2Matmul(ManyRows, WeightOnly):
    OP = "w2_matmul"
    FORMATS = ["int2-g32", "int2a-g64", "ternary-g128"]
