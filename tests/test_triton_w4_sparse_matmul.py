"""w4_sparse_matmul in Triton's interpreter: kernels/w4_sparse_matmul.py."""

import torch

from memlm import sparse_formats

from .matmul_checks import off_by_one, random_case
from .triton_matmul_checks import ManyRows, matmul
from .triton_sparse_checks import Sparse

from memlm.kernels import w4_sparse_matmul


class TestW4SparseMatmul(ManyRows, Sparse):
    OP = "w4_sparse_matmul"
    FORMATS = ["2:4/int4-g32", "2:4/nf4-g64", "unstructured/int4-g128", "unstructured/nf4-g32"]
    SOME = ["2:4/nf4-g64", "unstructured/int4-g32"]
    INTEGERS = ["2:4/int4-g32", "unstructured/int4-g64"]
    SPACE = w4_sparse_matmul.SPACE

    def test_codes_anywhere(self):
        """Codes that begin between 32-bit words, as those of rows of a larger matrix do."""
        x, packed, _ = random_case("unstructured/int4-g32", 40, 96, 3, torch.float16)
        expected = matmul(self.OP, x, packed, None, self.SPACE[0])
        moved = packed.tensors() | {"codes": off_by_one(packed.codes)}
        moved = sparse_formats.SparsePacked(packed.format, 40, 96, **moved)
        assert torch.equal(matmul(self.OP, x, moved, None, self.SPACE[0]), expected)
        parts = sparse_formats.split_rows(packed, [16, 24])
        assert parts[1].codes.storage_offset() % 4
        parts = [matmul(self.OP, x, part, None, self.SPACE[0]) for part in parts]
        assert torch.equal(torch.cat(parts, dim=1), expected)
