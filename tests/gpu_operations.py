"""Writes the table of operations in docs/gpu.md, which kernel there is of each and which test proves it:
``python -m tests.gpu_operations``."""

import re

from benchmarks import harness
from memlm import kernels
from memlm.ops import _registry

from .build import ROOT

PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- begin: tests/gpu_operations.py -->\n", "<!-- end: tests/gpu_operations.py -->\n"
# Operations that another's test covers: whose, and what they are called there.
TESTED_WITH = {
    "attention_backward": ("attention", "backward"),
    "block_sparse_grad_x": ("block_sparse_matmul", '"grad_x"'),
    "block_sparse_grad_values": ("block_sparse_matmul", '"grad_values"'),
    "embedding": ("dequantize", "embedding"),
    "linear_cross_entropy_backward": ("linear_cross_entropy", "backward"),
}
HEAD = """\
| operation | CUDA C++ | its proof | torch op on CUDA | Triton | its proof |
| --- | --- | --- | --- | --- | --- |
"""


def proof(language: str, operation: str) -> str:
    """A link to the test; it fails where there is none."""
    of, called = TESTED_WITH.get(operation, (operation, operation))
    path = f"tests/test_{language}_{of}.py"
    if called not in (ROOT / path).read_text():
        raise AssertionError(f"{path} does not speak of {operation}")
    return f"[{'emulated' if language == 'cuda' else 'interpreted'}](../{path})"


def table() -> str:
    header = (ROOT / "csrc/include/memlm_cuda.h").read_text()
    glue = (ROOT / "csrc/torch/cuda.cpp").read_text()
    in_cuda = set(re.findall(r"memlm_cuda_(\w+)\(", header))
    in_torch = set(re.findall(r'operation<[^"]*>\("(\w+)"', glue))
    rows = []
    for name in sorted(_registry._references):
        cuda, triton = name in in_cuda, name in kernels.OPERATIONS
        rows.append([
            name, "yes" if cuda else "-", proof("cuda", name) if cuda else "-",
            "kernel" if name in in_torch else "reference", "yes" if triton else "-",
            proof("triton", name) if triton else "-",
        ])  # fmt: skip
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    harness.put_between(PAGE, BEGIN, END, table())
