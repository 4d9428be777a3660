"""w4_matmul: every implementation, instruction set and format against f64, and as a torch op."""

from .matmul_checks import WeightOnly


class TestW4Matmul(WeightOnly):
    OP = "w4_matmul"
    FORMATS = [
        "int4-g32", "int4-g64", "int4-g128", "int4a-g32",
        "int4a-g64", "int4a-g128", "nf4-g32", "nf4-g64",
    ]  # fmt: skip
    SOME = ["int4-g32", "nf4-g64", "int4a-g64"]
    INTEGERS = ["int4-g32", "int4-g128", "int4a-g32"]
    CODES = (0, 15)
