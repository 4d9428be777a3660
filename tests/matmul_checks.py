"""The tests that the weight-only matmuls share: the files of each derive a class from WeightOnly, which
says what they run on."""

import pytest
import torch

import memlm
from memlm import formats, ops
from memlm.ops import _matmul
from memlm.formats import Format, Packed, pack
from memlm.ops._registry import implementations
from memlm.ops.w4_sparse_dequantize import pattern_number
from memlm.quantize import quantize_weight, sparse_quantize
from memlm.sparse_formats import SparseFormat, SparsePacked

from . import numerics, sparse
from .paths import PATHS, path_id

# n, k: one of each, tails in both, several stretches of k, more tiles than one block.
SHAPES = [(1, 1), (16, 32), (17, 33), (5, 129), (100, 300), (33, 2111), (130, 4128)]
# Both sides of every register tile (4 rows scalar, 6 AVX2 and AVX-VNNI, 12 AVX-512, 16 and 32 AMX,
# which starts at 13 or 25), several tiles, tails.
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 25, 31, 33]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(n, k, dtype) for n, k in SHAPES for dtype in DTYPES]


# W among the arguments of the ops over sparse matrices.
WEIGHT_NAMES = {
    "block_sparse_matmul": "starts places codes scales offsets bits codebook n k".split(),
    "w4_sparse_matmul": "codes places starts scales pattern codebook n k group".split(),
}


def weight_arguments(packed: Packed | SparsePacked) -> tuple:
    """W among the torch op's arguments."""
    format, sizes = packed.format, (packed.n, packed.k)
    if isinstance(packed, SparsePacked):
        values = format.values
        codebook = int(not format.is_float and values.codebook == "nf")
        if format.pattern == "block":
            parts = (packed.starts, packed.places, packed.codes, packed.scales, packed.offsets)
            return (*parts, format.bits, codebook, *sizes)
        parts = (packed.codes, packed.places, packed.starts, packed.scales)
        return (*parts, pattern_number(format.pattern), codebook, *sizes, values.group)
    offsets = (packed.offsets,) if format.bits < 8 else ()
    if format.bits == 4:
        offsets = (*offsets, _matmul.CODEBOOKS.index(format.codebook))
    return (packed.codes, packed.scales, *offsets, *sizes, format.group)


def arguments(
    x, packed, bias, fast: bool, norm=None, eps=0.0, swiglu=False, residual=None
) -> tuple:
    """The torch op's arguments."""
    return (x, *weight_arguments(packed), bias, fast, norm, eps, swiglu, residual)


def quantized(w: torch.Tensor, format: str) -> Packed | SparsePacked:
    return (sparse_quantize if "/" in format else quantize_weight)(w, format)


def arithmetic(implementation: str, m: int, fast: bool, format: str) -> str:
    """As numerics.arithmetic; weights that are floats are always multiplied as such."""
    floats = "/" in format and SparseFormat.parse(format).is_float
    return numerics.arithmetic(implementation, m, fast and not floats)


def run(name: str, implementation: str, x, packed, bias, fast, **around):
    return implementations(name)[implementation](*arguments(x, packed, bias, fast, **around))


def random_case(format: str, n: int, k: int, m: int, dtype, seed: int = 0):
    """x, W, for a sparse format with half of its weights unless it is tiny, and bias."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    if "/" in format:
        density = 0.5 if k > 32 and not format.startswith("2:4") else 1.0
        w = sparse.random_weights(SparseFormat.parse(format), n, k, density, seed)
    # Columns of very different size, as activations have.
    spread = torch.exp(2 * torch.randn(k, generator=generator))
    x = (torch.randn(m, k, generator=generator) * spread).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    return x, quantized(w, format), bias


def check_against_fp64(name, format, implementation, isa, fast, cases=CASES, rows=ROWS):
    if isa is not None:
        memlm.set_isa(isa)
    for n, k, dtype in cases:
        x, packed, bias = random_case(format, n, k, max(rows), dtype)
        known = {}
        for m in rows:
            kind = arithmetic(implementation, m, fast, format)
            if kind not in known:
                known[kind] = numerics.exact_matmul(x, packed, bias, kind)
            exact, bound = known[kind]
            y = run(name, implementation, x[:m].contiguous(), packed, bias, fast)
            assert y.dtype == dtype and y.shape == (m, n)
            numerics.assert_within(y, exact[:m], bound[:m])
        y = run(name, implementation, x[:1], packed, None, fast)
        kind = arithmetic(implementation, 1, fast, format)
        numerics.assert_within(y, *numerics.exact_matmul(x[:1], packed, None, kind))


def around_cases(format: str, n: int, k: int, m: int, dtype):
    """(x, packed, the layers around the product), each kind of them and together."""
    x, packed, _ = random_case(format, n, k, m, dtype)
    both = random_case(format, -(-n // 16) * 32, k, m, dtype)[1]  # gate above up
    generator = torch.Generator().manual_seed(7)
    x = (x / x.float().square().mean().sqrt()).to(dtype)  # silu's product stays within f16
    norm = (1 + torch.randn(k, generator=generator)).to(dtype)
    residual = torch.randn(m, n, generator=generator).to(dtype)
    narrow = torch.randn(m, both.n // 2, generator=generator).to(dtype)
    return [
        (x, packed, {"norm": norm, "eps": 1e-5}),
        (x, both, {"swiglu": True}),
        (x, packed, {"residual": residual}),
        (x, both, {"norm": norm, "eps": 1e-5, "swiglu": True, "residual": narrow}),
        (x, packed, {"norm": norm, "eps": 1e-5, "residual": residual}),
    ]


def check_around(name, format, implementation, isa, fast, dtypes=DTYPES):
    if isa is not None:
        memlm.set_isa(isa)
    for n, k, m in ((1, 1, 1), (17, 33, 7), (100, 300, 1), (40, 1056, 41)):
        for dtype in dtypes:
            for x, packed, around in around_cases(format, n, k, m, dtype):
                y = run(name, implementation, x, packed, None, fast, **around)
                kind = arithmetic(implementation, m, fast, format)
                exact, bound = numerics.exact_around(x, packed, kind, **around)
                numerics.assert_within(y, exact, bound)
                # Zeros would be far outside; half of all gates are closed, and give next to nothing.
                least = 0.3 if "swiglu" in around else 0.8
                stored = exact != 0  # where a sparse W has any weight; a tiny one has few
                share = (exact.abs() > bound)[stored].double().mean()
                assert share > least or ("/" in format and exact.numel() <= 16)


def check_around_extremes(name, format):
    """Gates at which exp over- or underflows, zeros, and what is not finite."""
    packed = random_case(format, 20, 64, 1, torch.float32)[1]
    values = [-1e4, -100.0, -88.0, -87.0, 0.0, 87.0, 88.0, 1e4]
    w = torch.cat((torch.tensor(values).repeat(2), torch.ones(16)))[:, None].expand(32, 64).clone()
    w[:, 1:] = 0
    both, x = quantized(w, format), torch.zeros(40, 64)
    x[:, 0] = 1
    for m in (1, 40):
        y = run(name, "cpp", x[:m], both, None, False, swiglu=True)
        kind = arithmetic("cpp", m, False, format)
        numerics.assert_within(y, *numerics.exact_around(x[:m], both, kind, swiglu=True))
    norm, zeros, x = torch.ones(64), torch.zeros(1, 64), torch.ones(1, 64)
    assert torch.equal(run(name, "cpp", zeros, packed, None, True, norm=norm, eps=1e-5), torch.zeros(1, 20))
    for value in (float("nan"), float("inf")):
        for fast in (True, False):
            bad = x.clone()
            bad[0, 3] = value
            assert not run(name, "cpp", bad, both, None, fast, swiglu=True).isfinite().all()
            assert not run(name, "cpp", bad, packed, None, fast, norm=norm, eps=1e-5).isfinite().all()


def check_around_gradient(name, format):
    for x, packed, around in around_cases(format, 40, 96, 5, torch.float32):
        def leaves():
            return [t.clone().requires_grad_() for t in (x, *(v for v in around.values() if isinstance(v, torch.Tensor)))]

        tensors = [key for key, value in around.items() if isinstance(value, torch.Tensor)]
        mine, theirs = leaves(), leaves()
        settings = {key: value for key, value in around.items() if key not in tensors}
        ops.matmul(mine[0], packed, mode="accurate", **settings, **dict(zip(tensors, mine[1:]))).square().sum().backward()
        given = dict(zip(tensors, theirs[1:]))
        h = _matmul.prologue(theirs[0], 96, given.get("norm"), around.get("eps", 0.0))
        y = h @ ops.dequantize(packed).T
        swiglu = around.get("swiglu", False)
        _matmul.epilogue(y, None, swiglu, given.get("residual")).square().sum().backward()
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item())
        torch.library.opcheck(
            getattr(torch.ops.memlm, name).default,
            arguments(mine[0], packed, None, False, **settings, **dict(zip(tensors, mine[1:]))),
        )


def check_f32_scales(name, format, fast):
    """Weights far outside f16's range keep f32 scales."""
    for size in (1e-12, 1e12):
        w = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * size
        if "/" in format:
            w *= sparse.mask(SparseFormat.parse(format), 40, 96, 0.7)
        packed = quantized(w, format)
        assert packed.scales.dtype == torch.float32
        for m in (7, 40):
            x = torch.randn(m, 96, generator=torch.Generator().manual_seed(2))
            y = run(name, "cpp", x, packed, None, fast)
            kind = arithmetic("cpp", m, fast, format)
            numerics.assert_within(y, *numerics.exact_matmul(x, packed, None, kind))


def check_integers_exact(name, format: str, code_low: int, code_high: int, isa: str):
    """With scales of 1 and integer activations whose largest is 127 in every group, the fast mode
    computes integers: exactly, at the extremes of codes and activations too, where the 16-bit
    sums of the AVX2 path are fullest."""
    memlm.set_isa(isa)
    format = Format.parse(format)
    dtype = torch.int8 if format.bits == 8 else torch.uint8
    generator = torch.Generator().manual_seed(0)
    n, k, m = 48, 256, 30
    random_q = torch.randint(code_low, code_high + 1, (n, k), generator=generator)
    random_x = torch.randint(-127, 128, (m, k), generator=generator)
    random_x[:, ::32] = 127
    signs = torch.where(torch.arange(k) % 2 == 0, 1, -1)
    for q in (random_q, torch.full((n, k), code_low), torch.full((n, k), code_high)):
        for x in (random_x, torch.full((m, k), 127), torch.full((m, k), -127), 127 * signs.expand(m, k)):
            scales = torch.ones(n, format.groups(k))
            zero = formats.ZEROS[format.bits]
            offsets = None if format.symmetric else torch.full((n, format.groups(k)), -float(zero))
            packed = pack(q.to(dtype), scales, offsets, format)
            exact = x.long() @ (q.long() - zero).T
            y = run(name, "cpp", x.float(), packed, None, True)
            assert torch.equal(y, exact.float())
            y = run(name, "cpp", x[:1].float(), packed, None, True)
            assert torch.equal(y, exact[:1].float())


def check_threads(name, format, fast):
    # Work for 4 threads at one row, for all of 8 at more.
    x, packed, bias = random_case(format, 1111, 555, 70, torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append([run(name, "cpp", x[:m], packed, bias, fast) for m in (1, 5, 70)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def check_not_finite(name, format, fast):
    """What is not finite stays in its own row; its row does not pass for finite."""
    for m in (3, 40):
        check_not_finite_rows(name, format, fast, m)


def check_not_finite_rows(name, format, fast, m):
    x, packed, bias = random_case(format, 20, 70, m, torch.float32)
    clean = run(name, "cpp", x, packed, bias, fast)
    others = [row for row in range(m) if row != 1]
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = x.clone()
        bad[1, 69] = value
        y = run(name, "cpp", bad, packed, bias, fast)
        assert torch.equal(y[others], clean[others])
        assert not torch.isfinite(y[1]).all()
        if fast:
            assert torch.isnan(y[1]).all()


def check_small_activations(name, format):
    """Groups of zeros, and of numbers so small that their reciprocal overflows, give no NaN."""
    for m in (2, 40):
        x, packed, _ = random_case(format, 20, 96, m, torch.float32)
        x[0, :32] = 0
        x[0, 32:64] = 1e-40
        x[1] = 0
        y = run(name, "cpp", x, packed, None, True)
        kind = arithmetic("cpp", m, True, format)
        numerics.assert_within(y, *numerics.exact_matmul(x, packed, None, kind))
        assert torch.equal(y[1], torch.zeros(20))


def check_large_sizes(name, format, fast):
    """Sizes of real models that no tile or group divides evenly in powers of two."""
    for n, k in ((29568, 32), (17, 29568)):
        x, packed, bias = random_case(format, n, k, 33, torch.float32)
        for m in (1, 33):
            y = run(name, "cpp", x[:m].contiguous(), packed, bias, fast)
            kind = arithmetic("cpp", m, fast, format)
            numerics.assert_within(y, *numerics.exact_matmul(x[:m], packed, bias, kind))


def off_by_one(t: torch.Tensor) -> torch.Tensor:
    """The same numbers one element into a buffer, where nothing is aligned."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def check_unaligned(name, format, fast):
    x, packed, bias = random_case(format, 70, 300, 33, torch.float32)
    parts = {name: off_by_one(tensor) for name, tensor in packed.tensors().items()}
    moved = type(packed)(packed.format, 70, 300, **parts)
    for m in (1, 7, 33):
        y = run(name, "cpp", off_by_one(x[:m]), moved, off_by_one(bias), fast)
        assert torch.equal(y, run(name, "cpp", x[:m].contiguous(), packed, bias, fast))


def check_shapes_and_strides(name, format):
    x, packed, bias = random_case(format, 20, 70, 12, torch.float32)
    flat = run(name, "cpp", x, packed, bias, False)
    assert torch.equal(run(name, "cpp", x.view(3, 2, 2, 70), packed, bias, False).view(12, 20), flat)
    torch.testing.assert_close(run(name, "cpp", x[0], packed, bias, False), flat[0])  # other order
    strided = torch.randn(70, 24)[:, ::2].T.copy_(x)
    assert not strided.is_contiguous()
    assert torch.equal(run(name, "cpp", strided, packed, bias, False), flat)
    assert run(name, "cpp", x[:0], packed, bias, False).shape == (0, 20)
    assert run(name, "cpp", x.view(3, 4, 70)[:, :0], packed, bias, True).shape == (3, 0, 20)


def check_torch_op(name, format, fast):
    op = getattr(torch.ops.memlm, name).default
    x, packed, bias = random_case(format, 20, 96, 6, torch.float32)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(op, arguments(x, packed, bias, fast))
    torch.library.opcheck(op, arguments(x.detach().bfloat16(), packed, None, fast))


def check_gradient(name, format):
    """The gradient is that of a linear layer with the dequantised weights."""
    original, _matmul.GRAD_ROWS = _matmul.GRAD_ROWS, 64  # several pieces
    try:
        x, packed, bias = random_case(format, 150, 100, 6, torch.float32)
        w = ops.dequantize(packed)
        for fast in (True, False):
            a, b = x.clone().requires_grad_(), bias.clone().requires_grad_()
            c, d = x.clone().requires_grad_(), bias.clone().requires_grad_()
            seed = torch.randn(6, 150, generator=torch.Generator().manual_seed(3))
            ops.matmul(a, packed, b, "fast" if fast else "accurate").backward(seed)
            torch.nn.functional.linear(c, w, d).backward(seed)
            torch.testing.assert_close(a.grad, c.grad, rtol=1e-5, atol=1e-5 * c.grad.abs().max().item())
            torch.testing.assert_close(b.grad, d.grad)
            assert not packed.codes.requires_grad
    finally:
        _matmul.GRAD_ROWS = original


def check_compile(format):
    torch._dynamo.reset()  # all operations compile this one function: each is a recompilation
    x, packed, bias = random_case(format, 20, 96, 6, torch.float32)

    def layer(x, bias):
        return ops.matmul(x.relu(), packed, bias, "accurate") * 2

    compiled = torch.compile(layer, fullgraph=True)
    expected = layer(x, bias)
    torch.testing.assert_close(compiled(x, bias), expected)
    a = x.clone().requires_grad_()
    compiled(a, bias).sum().backward()
    b = x.clone().requires_grad_()
    layer(b, bias).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.compile(layer, fullgraph=True)(x, bias).dtype == torch.bfloat16


def check_autocast(format):
    x, packed, bias = random_case(format, 20, 96, 6, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = ops.matmul(x, packed, bias)
        assert y.dtype == dtype
        assert torch.equal(y, ops.matmul(x.to(dtype), packed, bias.to(dtype)))


def check_bad_input(name, format):
    x, packed, bias = random_case(format, 20, 96, 6, torch.float32)
    op = getattr(torch.ops.memlm, name).default

    def refused(error, match, x=x, bias=bias, **changes):
        parts = {"codes": packed.codes, "scales": packed.scales, "offsets": packed.offsets}
        sizes = {"n": packed.n, "k": packed.k, "group": packed.format.group}
        parts |= {k: v for k, v in changes.items() if k in parts}
        sizes |= {k: v for k, v in changes.items() if k in sizes}
        tensors = list(parts.values())[: 3 if packed.format.bits < 8 else 2]
        around = [changes.get(name) for name in ("norm", "eps", "swiglu", "residual")]
        rest = (*sizes.values(), bias, True, around[0], around[1] or 0.0, around[2] or False, around[3])
        with pytest.raises(error, match=match):
            getattr(ops, name)(x, *tensors, *rest)
        if all(isinstance(t, torch.Tensor) or t is None for t in (x, bias, *tensors)):
            codebook = (0,) if packed.format.bits == 4 else ()
            with pytest.raises(RuntimeError):  # the op itself reads nothing it should not
                op(x, *tensors, *codebook, *rest)

    refused(TypeError, "x: got torch.float64", x=x.double(), bias=None)
    refused(TypeError, "x: got list", x=[1.0])
    refused(ValueError, r"x: got shape \[6, 95\]", x=x[:, :95])
    refused(ValueError, r"x: got shape \[\]", x=torch.tensor(1.0))
    refused(TypeError, "bias: got torch.bfloat16", bias=bias.bfloat16())
    refused(ValueError, r"bias: got shape \[19\]", bias=bias[:19])
    refused(memlm.FormatError, "codes: got torch.int32", codes=packed.codes.int())
    refused(memlm.FormatError, "codes: got", codes=packed.codes[:1])
    refused(memlm.FormatError, "codes: must be contiguous", codes=packed.codes.transpose(2, 3).contiguous().transpose(2, 3))  # fmt: skip
    refused(memlm.FormatError, "scales: got torch.float64", scales=packed.scales.double())
    refused(memlm.FormatError, "codes: got|scales: got", n=33)
    refused(memlm.FormatError, "codes: got|scales: got", k=300)
    refused(ValueError, "group: got 48", group=48)
    refused(ValueError, r"norm: got shape \[95\]", norm=torch.ones(95))
    refused(TypeError, "norm: got torch.float16", norm=torch.ones(96).half())
    refused(ValueError, "swiglu: W has 20 rows, accepted are multiples of 32", swiglu=True)
    refused(ValueError, r"residual: got shape \[5, 20\]", residual=torch.ones(5, 20))
    refused(TypeError, "residual: got torch.bfloat16", residual=torch.ones(6, 20).bfloat16())
    refused(ValueError, "shape: got n=0", n=0)
    with pytest.raises(ValueError, match="mode: got 'best'"):
        ops.matmul(x, packed, bias, "best")


class WeightOnly:
    """Every implementation, instruction set and format against f64, and as a torch op.

    ``OP``: the operation; ``FORMATS``: those compared with f64; ``SOME``: one of each kind, for the
    rest; ``INTEGERS``: formats whose codes are the integers ``CODES`` (lowest, highest)."""

    OP: str
    FORMATS: list[str]
    SOME: list[str]
    INTEGERS: list[str]
    CODES: tuple[int, int]

    def pytest_generate_tests(self, metafunc):
        values = {
            "fast": [True, False],
            "path": PATHS,
            "isa": memlm.isas(),
            "format": self.FORMATS,
            "some": self.SOME,
            "integers": self.INTEGERS,
        }
        ids = {
            "fast": lambda fast: "fast" if fast else "accurate",
            "path": path_id,
        }
        for name in metafunc.fixturenames:
            if name in values:
                metafunc.parametrize(name, values[name], ids=ids.get(name))

    def test_against_fp64(self, format, path, fast, restore_isa):
        check_against_fp64(self.OP, format, *path, fast)

    def test_integers_are_exact(self, integers, isa, restore_isa):
        check_integers_exact(self.OP, integers, *self.CODES, isa)

    def test_numbers(self, some, fast):
        check_f32_scales(self.OP, some, fast)
        check_not_finite(self.OP, some, fast)
        check_small_activations(self.OP, some)

    def test_independent_of_threads(self, some, fast, restore_threads):
        check_threads(self.OP, some, fast)

    def test_shapes_and_strides(self, some):
        check_shapes_and_strides(self.OP, some)

    def test_large_sizes(self, some, fast):
        check_large_sizes(self.OP, some, fast)

    def test_unaligned(self, some, fast):
        check_unaligned(self.OP, some, fast)

    def test_opcheck(self, some, fast):
        check_torch_op(self.OP, some, fast)

    def test_torch(self, some):
        check_gradient(self.OP, some)
        check_autocast(some)

    def test_compile(self):
        check_compile(self.SOME[-1])

    def test_bad_input(self, some):
        check_bad_input(self.OP, some)

    def test_with_the_layers_around_it(self, some, path, fast, restore_isa):
        check_around(self.OP, some, *path, fast)

    def test_layers_around_it_at_extremes_and_their_gradients(self, some):
        check_around_extremes(self.OP, some)
        check_around_gradient(self.OP, some)
