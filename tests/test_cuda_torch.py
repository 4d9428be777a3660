"""The torch ops over the CUDA kernels: their C++ code runs over the emulator; on a GPU it runs itself."""

import warnings
from importlib.util import find_spec
from ctypes import byref

import pytest
import torch
from torch import nn

import memlm
from memlm import formats, ops
from memlm.formats import Format, Packed
from memlm.ops import _cuda

from . import emulated_torch, emulator, numerics
from .gpu_matmul_checks import DTYPES, in_range
from .matmul_checks import arguments, random_case

needs_gpu = pytest.mark.skipif(
    bool(_cuda.unavailable()) or not torch.cuda.is_available(), reason="needs a GPU, and `make cuda`"
)
FORMATS = {"w2_matmul": "int2a-g64", "w4_matmul": "int4a-g32", "w8_matmul": "int8-row"}


@pytest.mark.parametrize("what", ["weight_only", "unpacked", "unsupported", "registered", "paged", "attention", "others", "device_runner"])
def test_over_the_emulator(what, tmp_path):
    emulated_torch.start(what, tmp_path)


def test_sizes_beyond_32_bits_are_refused():
    """n * k may be anything; a row of tiles has its limit."""
    x, packed, _ = random_case("int4-g32", 16, 32, 1, torch.float16)
    args = emulator.MatmulArgs(m=1, x=x.data_ptr(), x_stride=1 << 40, y=x.data_ptr(), y_stride=1 << 40, dtype=1)
    for n, k in ((1 << 31, 32), (16, 1 << 27)):
        w = emulator.packed_struct(packed)
        w.n, w.k = n, k
        with pytest.raises(RuntimeError, match=f"w: got n = {n}, k = {k}, accepted are up to 21474"):
            emulator.emulator().run("memlm_cuda_w4_matmul", byref(w), byref(args))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_registered():
    assert _cuda.unavailable() in (
        "this torch was built without CUDA", "there is no CUDA driver (libcuda.so.1)"
    )  # fmt: skip
    # Triton asks for a GPU when it runs.
    triton = ["triton"] if torch.version.cuda and find_spec("triton") else []
    assert list(ops.implementations("w4_matmul", "cuda")) == ["reference", *triton]
    assert "CUDA: registered at csrc" not in torch._C._dispatch_dump("memlm::w4_matmul")


def test_open_library_says_what_is_wrong(tmp_path):
    assert "nowhere.so" in _cuda.open_library(tmp_path / "nowhere.so")


def on_gpu(values: tuple) -> list:
    return [v.cuda() if isinstance(v, torch.Tensor) else v for v in values]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_on_the_gpu(name, dtype):
    x, packed, bias = random_case(FORMATS[name], 130, 4128, 33, torch.float32)
    x, bias = in_range(x, dtype), bias.to(dtype)
    exact = numerics.exact_matmul(x, packed, bias, "mma")
    for run in (getattr(torch.ops.memlm, name), ops.implementations(name, "cuda")["cuda"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is not the reference
            y = run(*on_gpu(arguments(x, packed, bias, False)))
        assert y.is_cuda and y.dtype == dtype
        numerics.assert_within(y.cpu(), *exact)


@needs_gpu
def test_many_rows_and_panels():
    emulated_torch.start("many_panels", None)


@needs_gpu
def test_f32_on_the_gpu_runs_the_reference():
    x, packed, bias = random_case("int4-g32", 40, 96, 9, torch.float32)
    given = on_gpu(arguments(x, packed, bias, False))
    with pytest.warns(UserWarning, match="got f32 on compute capability"):
        y = torch.ops.memlm.w4_matmul(*given)
    assert torch.equal(y, ops.implementations("w4_matmul", "cuda")["reference"](*given))


@needs_gpu
def test_tensors_of_two_devices_are_refused():
    x, packed, _ = random_case("int4-g32", 40, 96, 9, torch.float16)
    given = arguments(x, packed, None, False)
    with pytest.raises(RuntimeError, match="codes: must be on the device of the other tensors"):
        torch.ops.memlm.w4_matmul(given[0].cuda(), *given[1:])


@needs_gpu
def test_streams_and_graphs():
    """Work goes to the current stream; a graph replays it, workspace included, on new input."""
    x, packed, bias = random_case("nf4-g64", 40, 8192, 3, torch.float32)
    x, bias = in_range(x, torch.float16), bias.half()
    given = on_gpu(arguments(x, packed, bias, False))
    expected = torch.ops.memlm.w4_matmul(*given)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = given[0] * 1  # ready when the stream has slept
        y = torch.ops.memlm.w4_matmul(late, *given[1:])
    stream.synchronize()
    assert torch.equal(y, expected)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(given[0])
    with torch.cuda.graph(graph):
        y = torch.ops.memlm.w4_matmul(static, *given[1:])
    for _ in range(3):
        static.copy_(given[0])
        graph.replay()
        assert torch.equal(y, expected)
        static.zero_()


@needs_gpu
def test_compiled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 32)).half()
    memlm.quantize_(model, "int4")
    model.cuda()
    x = torch.randn(5, 96, dtype=torch.float16, device="cuda")
    row = memlm.explain(model).rows[0]
    assert row.isa.startswith("cuda sm_") and not row.reason
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-2, atol=1e-3)


@needs_gpu
def test_more_than_2_to_the_31_weights():
    """The last rows of a W of 2^31 + 2^20 weights, which all indices must reach."""
    n, k = (1 << 17) + 64, 1 << 14
    format = Format.parse("int4-g128")
    parts = formats.layout(format, n, k)
    tensors = {key: torch.zeros(shape, dtype=dtype, device="cuda") for key, (shape, dtype) in parts.items()}
    x, last, _ = random_case("int4-g128", 16, k, 9, torch.float32)
    x = in_range(x, torch.float16)
    for key, tensor in last.tensors().items():
        tensors[key][-1] = tensor[0].cuda()
    y = torch.ops.memlm.w4_matmul(*on_gpu(arguments(x, Packed(format, n, k, **tensors), None, False)))
    assert not y[:, :-16].any()
    numerics.assert_within(y[:, -16:].cpu(), *numerics.exact_matmul(x, last, None, "mma"))
