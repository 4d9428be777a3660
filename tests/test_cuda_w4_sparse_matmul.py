"""w4_sparse_matmul on the emulated GPU: csrc/cuda/w4_sparse_matmul.cu."""

from .cuda_sparse_checks import Sparse


class TestW4SparseMatmul(Sparse):
    OP = "w4_sparse_matmul"
    FORMATS = ["2:4/int4-g32", "2:4/nf4-g64", "unstructured/int4-g128", "unstructured/nf4-g32"]
    SOME = ["2:4/nf4-g64", "unstructured/int4-g32"]
    ANOTHER = "block/int4-g32"
