"""w2_matmul: every implementation, instruction set and format against f64, and as a torch op."""

from .matmul_checks import WeightOnly


class TestW2Matmul(WeightOnly):
    OP = "w2_matmul"
    FORMATS = ["int2-g32", "int2-g128", "int2a-g64", "ternary-g64"]
    SOME = ["int2-g32", "int2a-g64"]
    INTEGERS = ["int2-g32", "int2-g128", "int2a-g32"]
    CODES = (0, 3)
