"""w4_matmul in Triton's interpreter: kernels/w4_matmul.py."""

from .triton_matmul_checks import ManyRows, WeightOnly


class TestW4Matmul(ManyRows, WeightOnly):
    OP = "w4_matmul"
    FORMATS = ["int4-g32", "int4-g128", "int4a-g32", "int4a-g64", "nf4-g32", "nf4-g64"]
