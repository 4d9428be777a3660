"""The tests that the sparse matmuls share, beside those of all weight-only ones."""

import ctypes
import mmap

import pytest
import torch

import memlm
from memlm import formats, ops, sparse_formats
from memlm.quantize import sparse_quantize
from memlm.sparse_formats import SparseFormat, SparsePacked, pack

from . import matmul_checks, sparse
from .matmul_checks import WeightOnly, run

CASES = [
    (1, 1, torch.float32), (17, 33, torch.bfloat16), (40, 300, torch.float16),
    (130, 1057, torch.float32),
]  # fmt: skip
ROWS = [1, 5, 13, 33]  # both sides of the widest register tile; amx begins at 13 or 25


def check_integers_exact(name, format: SparseFormat, isa: str):
    """As matmul_checks.check_integers_exact: with scales of 1 the fast mode computes integers."""
    memlm.set_isa(isa)
    values, (n, k, m) = format.values, (48, 256, 30)
    low, high = values.codes.start, values.codes.stop - 1
    dtype = torch.int8 if values.bits == 8 else torch.uint8
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (m, k), generator=generator)
    x[:, ::32] = 127
    keep = sparse.mask(format, n, k, 0.5)
    scales, zero = torch.ones(n, values.groups(k)), formats.ZEROS[values.bits]
    offsets = None if values.symmetric else -zero * scales
    random_q = torch.randint(low, high + 1, (n, k), generator=generator)
    for q in (random_q, torch.full((n, k), low), torch.full((n, k), high)):
        packed = pack(q.to(dtype), keep, scales, offsets, format)
        exact = (x @ ((q - zero) * keep).T).float()
        for rows in (1, 6, m):
            assert torch.equal(run(name, "cpp", x[:rows].float(), packed, None, True), exact[:rows])


def check_equals_dense(name, format: SparseFormat, path):
    """The result of integer sums is that of the dense kernel over the same zeros, to the bit."""
    implementation, isa = path
    if isa:
        memlm.set_isa(isa)
    for n, k in ((100, 300), (33, 2080)):
        for density in (0.0, 0.1, 0.5, 1.0):
            packed = sparse_quantize(sparse.random_weights(format, n, k, density), format)
            dense = sparse_formats.to_dense(packed)
            x = torch.randn(40, k, generator=torch.Generator().manual_seed(1))
            bias = torch.randn(n, generator=torch.Generator().manual_seed(2))
            for m in (1, 6, 40):
                y = run(name, implementation, x[:m], packed, bias, True)
                same = f"w{packed.format.bits}_matmul"
                assert torch.equal(y, run(same, implementation, x[:m], dense, bias, True))


def check_empty(name, format: SparseFormat):
    """A matrix without a weight gives the bias; rows without one theirs."""
    empty = sparse_quantize(torch.zeros(40, 70), format)
    w = sparse.random_weights(format, 40, 70, 1.0)
    w[16:32] = 0
    some = sparse_quantize(w, format)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(0))
    for m in (1, 33):
        x = torch.randn(m, 70, generator=torch.Generator().manual_seed(1))
        for fast in (True, False):
            assert torch.equal(run(name, "cpp", x, empty, bias, fast), bias.expand(m, 40))
            y = run(name, "cpp", x, some, bias, fast)
            assert torch.equal(y[:, 16:32], bias[16:32].expand(m, 16))
            assert (y[:, :16] != bias[:16]).all()


def assert_op_refuses(name: str, packed: SparsePacked, match: str, x=None, **changes):
    """That the op refuses these tensors itself, as RuntimeError, and the public function says
    which: FormatError, a ValueError."""
    x = torch.randn(5, packed.k) if x is None else x
    names = matmul_checks.WEIGHT_NAMES[name]
    given = dict(zip(names, matmul_checks.weight_arguments(packed))) | changes
    around = (None, True, None, 0.0, False, None)
    with pytest.raises(RuntimeError):
        getattr(torch.ops.memlm, name)(x, *(given[n] for n in names), *around)
    book = ["int", "nf"][given.pop("codebook")]
    if "pattern" in given:
        given["pattern"] = {1: "2:4", 2: "unstructured"}.get(given["pattern"], given["pattern"])
    with pytest.raises((memlm.FormatError, ValueError, TypeError), match=match):
        getattr(ops, name)(x, **given, codebook=book)


def before_unreadable_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose end is that of a page behind which nothing can be read."""
    page = mmap.PAGESIZE
    pages = -(-tensor.nbytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    libc = ctypes.CDLL(None, use_errno=True)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=pages * page)
    copy = whole[pages * page - tensor.nbytes :].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


class Sparse(WeightOnly):
    """WeightOnly over sparse formats: of all that the dense kernels' code does, once; and that they
    give the dense result."""

    def test_against_fp64(self, format, path, fast, restore_isa):
        matmul_checks.check_against_fp64(self.OP, format, *path, fast, CASES, ROWS)

    def test_equals_the_dense_product(self, format, path, restore_isa):
        if not SparseFormat.parse(format).is_float:
            check_equals_dense(self.OP, SparseFormat.parse(format), path)

    def test_integers_are_exact(self, integers, isa, restore_isa):
        check_integers_exact(self.OP, SparseFormat.parse(integers), isa)

    def test_numbers(self, some, fast):
        if not SparseFormat.parse(some).is_float:
            matmul_checks.check_f32_scales(self.OP, some, fast)
        matmul_checks.check_small_activations(self.OP, some)

    def test_opcheck(self, some):
        matmul_checks.check_torch_op(self.OP, some, True)

    def test_large_sizes(self, some):
        matmul_checks.check_large_sizes(self.OP, some, True)

    def test_with_the_layers_around_it(self, some, fast):
        matmul_checks.check_around(self.OP, some, "cpp", None, fast, [torch.float32])

    def test_layers_around_it_at_extremes_and_their_gradients(self):
        matmul_checks.check_around_extremes(self.OP, self.SOME[0])
        matmul_checks.check_around_gradient(self.OP, self.SOME[-1])

    def test_empty(self, some):
        check_empty(self.OP, SparseFormat.parse(some))
