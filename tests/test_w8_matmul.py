"""w8_matmul: every implementation, instruction set and format against f64, and as a torch op."""

from .matmul_checks import WeightOnly


class TestW8Matmul(WeightOnly):
    OP = "w8_matmul"
    FORMATS = ["int8-row", "int8-g32", "int8-g64", "int8-g128"]
    SOME = ["int8-g32", "int8-row"]
    INTEGERS = ["int8-row", "int8-g32"]
    CODES = (-128, 127)
