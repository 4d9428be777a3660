"""A process in which memlm believes that there is a GPU: an empty CUDA driver, a torch that says it was
built with CUDA, and for libmemlm_cuda.so the emulator's library, whose device memory is the CPU's.  The
ops' C++ code for CUDA then runs on CPU tensors, as ``torch.ops.memlm_emulated.*``.

``start`` runs a function of this module there; each raises what it finds wrong.  Where the tests run on a GPU,
``torch.ops.memlm.*`` do instead, in the same process."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

from . import device

ROOT = Path(__file__).parent.parent
OF_EMULATOR = ("unsupported", "registered", "device_runner")  # a GPU has tests of its own for them


def start(function: str, folder: Path) -> None:
    """Runs ``function`` in such a process; raises AssertionError with what it says where it fails."""
    if device.wanted():
        return on_gpu(function)
    from .emulator import emulator

    driver = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", driver], check=True)
    env = os.environ | {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "MEMLM_CUDA_LIBRARY": str(emulator().path),
    }
    command = [sys.executable, "-c", f"from tests.emulated_torch import *; set_up(); {function}()"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def on_gpu(function: str) -> None:
    import pytest
    import torch

    from memlm import ops

    from .triton_interpreter import on_device

    if function in OF_EMULATOR:
        pytest.skip("of the emulated device")
    ops.emulated = on_device(lambda name: getattr(torch.ops.memlm, name), "cuda")
    globals()[function]()


def set_up() -> None:
    """Before memlm.ops is imported."""
    import torch

    torch.version.cuda = "13.0"
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors hold NaN
    kernels = types.ModuleType("memlm.kernels")
    kernels.OPERATIONS, kernels.available = ("w4_matmul",), lambda: True
    sys.modules["memlm.kernels"] = kernels
    import memlm
    memlm.kernels = kernels
    import memlm.ops
    from memlm.ops import _cuda, _registry

    assert _cuda.unavailable() == ""
    for name, kernels in _registry._cuda_kernels.items():
        if "cuda" not in kernels:
            continue
        schema = str(getattr(torch.ops.memlm, name).default._schema).removeprefix(f"memlm::{name}")
        torch.library.define(f"memlm_emulated::{name}", schema)
        assert _cuda.register("memlm_emulated", "CPU", name, or_reference=True)
    emulator_may_touch_all()
    memlm.ops.emulated = lambda name: getattr(torch.ops.memlm_emulated, name)


def emulator_may_touch_all() -> None:
    """The ops' own tensors cannot be named here."""
    if device.wanted():
        return
    from .emulator import emulator

    emulator().lib.emulator_forget()
    emulator().lib.emulator_seed(1)
    emulator().lib.emulator_register(0x1000, 1 << 62, 1)


def ran_well() -> None:
    if device.wanted():
        return
    from .emulator import emulator

    error = emulator().lib.emulator_error().decode()
    assert not error, emulator().located(error)


def weight_only() -> None:
    """Arguments reach the kernels as they should: each of them matters, in every type."""
    import torch

    from memlm import ops

    from . import numerics
    from .gpu_matmul_checks import DTYPES, in_range
    from .matmul_checks import arguments, around_cases, random_case

    formats = {"w2_matmul": "int2a-g64", "w4_matmul": "int4a-g32", "w8_matmul": "int8-row"}
    for name, format in formats.items():
        for dtype in DTYPES:
            x, packed, bias = random_case(format, 40, 96, 9, torch.float32)
            x, bias = in_range(x, dtype).view(3, 3, 96), bias.to(dtype)
            y = ops.emulated(name)(*arguments(x, packed, bias, False))
            numerics.assert_within(y, *numerics.exact_matmul(x, packed, bias, "mma"))
            apart = torch.empty(3, 3, 99, dtype=dtype)[:, :, 1:97].copy_(x)
            assert torch.equal(ops.emulated(name)(*arguments(apart, packed, bias, True)), y)
            empty = ops.emulated(name)(*arguments(x[:0], packed, bias, False))
            assert empty.shape == (0, 3, 40) and empty.dtype == dtype
        for x, packed, around in around_cases(format, 64, 96, 9, torch.float16):
            y = ops.emulated(name)(*arguments(x, packed, None, False, **around))
            numerics.assert_within(y, *numerics.exact_around(x, packed, "mma", **around))
    # Levels, and k that blocks share out: a workspace.
    x, packed, bias = random_case("nf4-g64", 40, 2112, 3, torch.float32)
    x, bias = in_range(x, torch.float16), bias.half()
    y = ops.emulated("w4_matmul")(*arguments(x, packed, bias, False))
    numerics.assert_within(y, *numerics.exact_matmul(x, packed, bias, "mma"))
    ran_well()


def unpacked() -> None:
    """Many rows are torch's product with weights rounded to x's type; those around the edge of what is many are
    the kernel's."""
    import torch

    from .gpu_matmul_checks import DTYPES

    for format in (
        "int2a-g64", "int4a-g32", "nf4-g64", "int8-row", "2:4/int4-g32", "unstructured/nf4-g64", "block/int4a-g32",
    ):  # fmt: skip
        for dtype in DTYPES:
            check_unpacked(format, 40, 96, dtype)
    check_unpacked("block/bf16", 40, 96, torch.bfloat16)
    check_few_blocks()
    ran_well()


def many_panels() -> None:
    """Of 128 MB in x's type: on a GPU."""
    import torch

    check_unpacked("int4-g128", 16648, 4096, torch.float16)


def check_few_blocks() -> None:
    """Where few blocks are stored, or weights are f32, their kernel multiplies."""
    import torch

    from memlm import ops
    from memlm.quantize import sparse_quantize

    from . import numerics
    from .gpu_matmul_checks import MANY, in_range
    from .matmul_checks import arguments, random_case

    x, packed, _ = random_case("block/f32", 40, 320, MANY, torch.float32)
    x = in_range(x, torch.float16)
    few = torch.zeros(40, 320)
    few[:16, 64:96] = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    for w in (packed, sparse_quantize(few, "block/int4-g32")):
        y = ops.emulated("block_sparse_matmul")(*arguments(x, w, None, False))
        exact, bound = numerics.exact_matmul(x, w, None, "mma")
        numerics.assert_within(y, exact, bound)
        # The product with rounded weights would be outside.
        assert ((numerics.exact_unpacked(x, w, None)[0] - exact).abs() > bound).any()


def check_unpacked(format: str, n: int, k: int, dtype) -> None:
    import pytest
    import torch

    from memlm import ops

    from . import numerics
    from .gpu_matmul_checks import MANY, check_many_rows, in_range
    from .matmul_checks import arguments, random_case

    x, packed, bias = random_case(format, n, k, MANY, torch.float32)
    dense = "/" not in format
    name = f"w{packed.format.bits}" if dense else "block_sparse" if format.startswith("block") else "w4_sparse"
    op = ops.emulated(f"{name}_matmul")

    def run(x, packed, bias, **around):
        return op(*arguments(x, packed, bias, False, **around))

    many = check_many_rows(run, format, n, k, dtype)
    x, bias = in_range(x, dtype), bias.to(dtype)
    few = run(x[: MANY - 2], packed, bias)
    numerics.assert_within(few, *numerics.exact_matmul(x[: MANY - 2], packed, bias, "mma"))
    if format != "block/bf16":  # whose weights are exact, and so the sums
        assert not torch.equal(many[: MANY - 2], few)
    for name, bad in (("norm", torch.ones(k - 1)), ("residual", torch.ones(MANY, n - 1))):
        with pytest.raises(RuntimeError, match=f"{name}: "):
            run(x, packed, None, **{name: bad.to(dtype)})
    packed = random_case(format, 24, k, 1, dtype)[1]
    for rows in (9, MANY):  # the kernel's message
        with pytest.raises(RuntimeError, match="swiglu: n / 2 must be a multiple of 16, n is 24"):
            run(x[:rows], packed, None, swiglu=True)


def unsupported() -> None:
    """f32 goes to the reference, with one warning that says why; the kernel alone refuses it."""
    import pytest
    import torch

    from memlm import ops

    from .matmul_checks import arguments, random_case

    x, packed, bias = random_case("int4-g32", 40, 96, 9, torch.float32)
    given = arguments(x, packed, bias, False)
    with pytest.warns(UserWarning, match="memlm.w4_matmul has no kernel for this call .dtype: got f32 on compute capability 8.0; accepted are f16 from"):
        y = ops.emulated("w4_matmul")(*given)
    assert torch.equal(y, ops.implementations("w4_matmul")["reference"](*given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.emulated("w4_matmul")(*given)
    # Bad input is not passed on: it is named.
    with pytest.raises(RuntimeError, match="x: the last dimension must be 96"):
        ops.emulated("w4_matmul")(*arguments(x[:, :90].half(), packed, None, False))
    with pytest.raises(RuntimeError, match="codes: the shape does not fit n, k and group"):
        ops.emulated("w4_matmul")(*(a[:1] if a is packed.codes else a for a in given))


def registered() -> None:
    """The kernels stand at the CUDA key; selection, and what explain says."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    import memlm
    from memlm import ops
    from memlm.ops import _registry

    from .matmul_checks import arguments, random_case

    for name in ("w2_matmul", "w4_matmul", "w8_matmul"):
        for namespace in ("memlm", "memlm_cuda"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "CUDA")
        assert "CUDA: registered at csrc/torch/cuda.cpp" in torch._C._dispatch_dump(f"memlm::{name}")
        triton = ["triton"] if name == "w4_matmul" else []
        assert list(ops.implementations(name, "cuda")) == ["reference", "cuda", *triton]
        assert list(ops.implementations(name, "cpu")) == ["reference", "cpp"]
    assert _registry.selected("w4_matmul", "cuda") == ("cuda", "")
    for name, kernels in _registry._cuda_kernels.items():
        if not kernels:
            assert _registry.selected(name, "cuda") == ("reference", f"{name} has no CUDA kernel")
    x, packed, bias = random_case("int4-g32", 40, 96, 9, torch.float16)
    with FakeTensorMode():

        def fake(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")

        given = [fake(a) if isinstance(a, torch.Tensor) else a for a in arguments(x, packed, bias, False)]
        y = torch.ops.memlm.w4_matmul(*given)
        assert (y.shape, y.dtype, y.device) == ((9, 40), torch.float16, torch.device("cuda:0"))
    memlm.quantize_(model := nn.Sequential(nn.Linear(96, 64)), "int4")
    with FakeTensorMode():
        for parameter in ("codes", "scales"):
            old = getattr(model[0], parameter)
            new = torch.empty(old.shape, dtype=old.dtype, device="cuda:0")
            new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            setattr(model[0], parameter, new)
        (row,) = memlm.explain(model).rows
    assert (row.op, row.isa, row.reason) == ("w4_matmul", "cuda cuda", ""), row


def paged() -> None:
    """kv_append stores the CPU's bytes; paged_attention gets the arguments that a C call gives."""
    import torch

    from memlm import ops

    from . import cuda_kv
    from .paged import paged as stored

    for type in ("bf16", "int8", "int4"):
        made = stored(type, 64, [40, 100], dtype=torch.float16)
        again = [None if t is None else torch.full_like(t, 255) for t in (made.pool, made.tails)]
        k, v = (torch.cat(parts) for parts in (made.k, made.v))
        ops.emulated("kv_append")(*again, k, v, *made.step(made.lengths))
        assert torch.equal(again[0], made.pool) and (made.tails is None or torch.equal(again[1], made.tails))
        q = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2)).half()
        given = (q, made.pool, made.tails, *made.step([1, 2]), 0.125, 0, 0.0, None, None)
        y = ops.emulated("paged_attention")(*given)
        ran_well()
        assert torch.equal(y, cuda_kv.paged_attention(*given))
        emulator_may_touch_all()


def others() -> None:
    """w4_sparse_dequantize, quantize_weight and matmul_topk: each argument reaches the kernel, in every type."""
    import torch

    from memlm import ops, sparse_formats

    from . import test_cuda_matmul_topk, test_quantize_weight, test_w4_sparse_dequantize
    from .gpu_matmul_checks import in_range
    from .matmul_checks import random_case

    types = (torch.float32, torch.float16, torch.bfloat16)
    for name in test_w4_sparse_dequantize.FORMATS:
        packed = test_w4_sparse_dequantize.packed_of(name, 40, 300)
        for dtype in types:
            given = test_w4_sparse_dequantize.arguments(packed, 7, 20, dtype)
            rows = ops.emulated("w4_sparse_dequantize")(*given)
            assert torch.equal(rows, sparse_formats.dequantize(packed, dtype)[7:27])
    for name in ("int8-row", "int4a-g32", "nf4-g64", "ternary-g64"):
        w = test_quantize_weight.normal(20, 150)
        for some, scale_dtype in zip((w, w.half().T.contiguous().T, w[:, 5:90].bfloat16()), types[:2] * 2):
            given = test_quantize_weight.arguments(some, name, scale_dtype)
            expected = ops.implementations("quantize_weight")["reference"](*given)
            test_quantize_weight.assert_same(ops.emulated("quantize_weight")(*given), expected, name)
    for format, mode, dtype in (("int4a-g32", 0, types[1]), ("nf4-g64", 1, types[2]), ("int8-row", 2, types[0])):
        x, packed, bias = random_case(format, 40, 96, 6, torch.float32)
        x, bias, norm = in_range(x, dtype), bias.to(dtype), torch.linspace(1, 2, 96).to(dtype)
        parts = (packed.codes, packed.scales, packed.offsets, packed.format.bits, int(format == "nf4-g64"))
        given = (*parts, 40, 96, packed.format.group, bias, mode, norm, 1e-5, 5)
        values, indices = ops.emulated("matmul_topk")(x.view(2, 3, 96), *given)
        ran_well()
        of_c = test_cuda_matmul_topk.topk(x, packed, bias, test_cuda_matmul_topk.MODES[mode], norm, 1e-5, 5)
        assert torch.equal(values.view(6, 5), of_c[0]) and torch.equal(indices.view(6, 5), of_c[1])
        emulator_may_touch_all()


def attention() -> None:
    """Arguments reach the kernels as a C call gives them, forward and backward; each of them matters."""
    import torch

    from memlm import ops

    from . import cuda_attention

    random = torch.Generator().manual_seed(3)

    def normal(*shape, dtype=torch.float16):
        return torch.randn(shape, generator=random).to(dtype)

    def compared(q, k, v, mask=None, offsets=(None, None), block_mask=None, seed=None, **options):
        rules = {"scale": 0.2, "left": -1, "right": -1, "to_end": False, "softcap": 0.0, "slopes": None}
        rules = rules | {"sinks": None, "dropout": 0.0} | options
        given = (mask, block_mask, 32, *offsets, *rules.values(), None if seed is None else torch.tensor(seed))
        out, lse = ops.emulated("attention")(q, k, v, *given)
        grad = normal(*q.shape[:3], v.shape[3], dtype=q.dtype)
        want_mask = mask is not None and mask.is_floating_point()
        found = ops.emulated("attention_backward")(grad, q, k, v, out, lse, *given, want_mask)
        ran_well()
        rules = rules | {"seed": seed, "block_mask": block_mask, "mask_block": 32}
        of_c = cuda_attention.forward(q, k, v, mask, offsets, **rules)
        assert torch.equal(out, of_c[0]) and torch.equal(lse, of_c[1])
        of_c = cuda_attention.backward(grad, q, k, v, mask, offsets, **rules)
        for name, x in zip(("q", "k", "v"), found):
            assert torch.equal(x, of_c[name]), name
        assert not want_mask or torch.equal(found[3].sum_to_size(mask.shape), of_c["mask"])
        assert rules["sinks"] is None or torch.equal(found[4], of_c["sinks"])
        emulator_may_touch_all()

    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = (normal(2, 9, heads, dim, dtype=dtype).transpose(1, 2) for heads, dim in ((4, 40), (2, 40), (2, 24)))
        heads = {"slopes": torch.rand(4, generator=random), "sinks": torch.randn(4, generator=random)}
        compared(q, k, v, normal(2, 1, 9, 9, dtype=dtype), right=0, softcap=5.0, **heads)
        compared(q, k, v, torch.rand(9, 9, generator=random).lt(0.8)[None, None], left=4, dropout=0.3, seed=7)
        compared(q[:1], k[:1], v[:1], offsets=(torch.tensor([0, 4, 9]),) * 2, right=0, to_end=True)
    q, k, v = (normal(1, 2, 70, 16) for _ in range(3))
    compared(q, k, v, block_mask=torch.rand(1, 2, 3, 3, generator=random).lt(0.6))


def adamw_8bit() -> None:
    """The op's arguments reach the kernel, which changes what it should, in place."""
    from memlm import ops
    from memlm.ops._registry import implementations

    from .adamw_cases import DTYPES, Case, equal, random_case

    for dtype in DTYPES:
        got = random_case(Case(700), dtype)
        expected = got.clone()
        implementations("adamw_8bit")["reference"](*expected.tensors(), *got.numbers)
        ops.emulated("adamw_8bit")(*got.tensors(), *got.numbers)
        equal(got, expected)
    ran_well()


def linear_cross_entropy() -> None:
    """Arguments reach the kernel, which has a workspace; f32 goes to the reference."""
    import pytest
    import torch

    from memlm import ops

    from .cross_entropy_cases import Case, backward_in_f64, forward_in_f64, random_case, random_grad
    from .numerics import assert_within

    for dtype in (torch.float16, torch.bfloat16):
        given = random_case(Case(20, 40, 150, True, 0.1, 0.2), dtype)
        exact = forward_in_f64(given)
        for hidden in (given.hidden, given.hidden.T.contiguous().T):
            losses, lse = ops.emulated("linear_cross_entropy")(hidden, *given.arguments()[1:])
            assert_within(losses, exact.losses, exact.bound)
            assert_within(lse, exact.lse, exact.bound)
        hidden, weight, bias, targets, *numbers = given.arguments()
        op = ops.emulated("linear_cross_entropy_backward")
        gradients = op(random_grad(given), hidden, weight, bias, targets, lse, *numbers, True, True, True)
        for found, of in zip(gradients, backward_in_f64(given, random_grad(given), rounded=True)):
            assert found.dtype == dtype
            assert_within(found, *of)
        nothing = op(random_grad(given), hidden, weight, bias, targets, lse, *numbers, False, False, False)
        assert [g.numel() for g in nothing] == [0, 0, 0]
    given = random_case(Case(20, 40, 150), torch.float32)
    with pytest.warns(UserWarning, match="linear_cross_entropy has no kernel for this call .dtype: got f32"):
        losses, _ = ops.emulated("linear_cross_entropy")(*given.arguments())
    expected = torch.ops.memlm.linear_cross_entropy(*given.arguments())[0]
    if device.wanted():  # whose f32 products are summed in another order
        torch.testing.assert_close(losses, expected)
    else:
        assert torch.equal(losses, expected)
    ran_well()


def device_runner() -> None:
    """tests/device.py, which runs the kernels' tests on a GPU, with the emulator for a GPU."""
    import pytest
    import torch

    from . import device, emulator
    from .gpu_matmul_checks import in_range
    from .matmul_checks import random_case

    x, packed, bias = random_case("nf4-g64", 40, 2112, 3, torch.float32)
    x, bias = in_range(x, torch.float16), bias.half()
    real = emulator.emulator
    there = device.Device(real().path, "cpu")
    emulator.emulator = lambda arch: there
    y = emulator.matmul("w4_matmul", x, packed, bias)
    emulator.emulator = real
    given = (packed.codes, packed.scales, None, 1, 40, 2112, 64, bias, False, None, 0.0, False, None)
    assert torch.equal(y, torch.ops.memlm_emulated.w4_matmul(x, *given))
    ran_well()
    copy = device.Copy(x, "cpu")
    copy.whole[copy.place - 1] = 0
    with pytest.raises(AssertionError, match="written out of bounds"):
        copy.back()
