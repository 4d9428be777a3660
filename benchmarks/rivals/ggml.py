"""ggml, llama.cpp's library: its own types, rounded by its own functions, and computed from the
layout of the file or from the one that it repacks weights into as it loads a model.

It is used through its C API: from llama-cpp-python, and from each library that the environment
variable ``MEMLM_GGML`` names, ``name=path`` of a libggml.so, with ``:`` between several.  So
forks, such as ik_llama.cpp, are compared.  It has to be built with OpenMP, as it is by default:
without, it would start threads for each call.  (Two libraries that consist of several files of the
same names do not go together in one process: the second would take the first's.)
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

from ..harness import ROUNDING, Candidate

F32 = 0  # enum ggml_type, as are
TYPES = {4: {"q4_0": 2, "q4_k": 12}, 8: {"q8_0": 8}}
IK_TYPES = {4: {"q4_0_r8": 202, "q4_k_r4": 212}, 8: {"q8_0_r8": 208}}  # rows interleaved
# The layout whose products can be compared.  There is one for AMX besides, which sets up a thread's
# tiles once and ends the process when another library of the process (oneDNN) has released them.
REPACKED = b"CPU_REPACK"
PRODUCTS = 256  # in a context, of which some versions allow but 64
NODES = 4  # more than a graph of one product has
TINY = 256  # rows and columns that every layout accepts
SUCCESS = 0  # enum ggml_status


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
SILENT = LOG(lambda level, text, data: None)
FUNCTIONS = {  # name -> (result, arguments)
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_blck_size": (c_int64, [c_int]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    # ik_llama.cpp's takes one pointer more, which the others do not look at
    "ggml_quantize_chunk": (c_size_t, [c_int, *[c_void_p] * 2, *[c_int64] * 3, *[c_void_p] * 2]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buft_get_alloc_size": (c_size_t, [c_void_p] * 2),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_alloc": (None, [c_void_p] * 3),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
}
# What gives the layouts to repack into; ik_llama.cpp has other types instead, and not these.
LAYOUT_FUNCTIONS = {
    "ggml_log_set": (None, [LOG, c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p] * 2),
}


class _Library:
    """A loaded libggml; its functions are attributes, without the prefix ``ggml_``."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))

        def declare(functions):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)

        declare(FUNCTIONS)
        self.backend = self.backend_cpu_init()
        self.current = _Context(self)
        # name -> what allocates weights in a layout
        self.layouts = {"": self.backend_cpu_buffer_type()}
        self.device = None
        if hasattr(library, "ggml_backend_cpu_reg"):
            declare(LAYOUT_FUNCTIONS)
            self.log_set(SILENT, None)  # it reports each weight
            reg = self.backend_cpu_reg()
            self.device = self.backend_reg_dev_get(reg, 0)
            address = self.backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
            for layout in iter(iter(extra).__next__, None):  # up to a null pointer
                if self.backend_buft_name(layout) == REPACKED:
                    self.layouts["_repack"] = layout

    def types(self, bits: int) -> dict[str, int]:
        return TYPES[bits] if self.device else {**TYPES[bits], **IK_TYPES[bits]}

    def quantize(self, w: torch.Tensor, type: int) -> torch.Tensor:
        """``w [n, k]`` -> the bytes of its rows.  Raises RuntimeError for a k that does not fit."""
        n, k = w.shape
        if k % self.blck_size(type):
            raise RuntimeError(f"k: got {k}, a multiple of {self.blck_size(type)} is needed")
        rows = torch.empty(n, self.row_size(type, k), dtype=torch.uint8)
        self.quantize_chunk(type, w.data_ptr(), rows.data_ptr(), 0, n, k, None, None)
        return rows

    def context(self) -> _Context:
        """Room for one product more."""
        if not self.current.left:
            self.current = _Context(self)
        self.current.left -= 1
        return self.current


class _Context:
    """Memory for the descriptions of PRODUCTS products: W, x, y and a graph."""

    def __init__(self, library: _Library):
        self.library, self.left = library, PRODUCTS
        product = 3 * library.tensor_overhead() + library.graph_overhead_custom(NODES, False)
        self.pointer = library.init(_InitParams(PRODUCTS * product, None, True))

    def __del__(self):
        self.library.free(self.pointer)


class _Matmul:
    """``W [n, k]`` in a layout, and the graph ``y = x @ W.T`` for one x."""

    def __init__(self, library: _Library, rows: torch.Tensor, k: int, type: int, layout: int):
        self.library, self.rows, self.k, self.type, self.layout = library, rows, k, type, layout
        self.nbytes = rows.nbytes
        self.context = library.context()  # kept as long as its tensors
        self.w = library.new_tensor_2d(self.context.pointer, type, k, len(rows))
        size = library.backend_buft_get_alloc_size(layout, self.w)
        self.buffers = [library.backend_buft_alloc_buffer(layout, size)]
        base = library.backend_buffer_get_base(self.buffers[0])
        library.backend_tensor_alloc(self.buffers[0], self.w, base)
        self.x = None

    def store(self) -> _Matmul:
        """Writes the weights, repacked where the layout says so."""
        self.library.backend_tensor_set(self.w, self.rows.data_ptr(), 0, self.nbytes)
        return self

    def __deepcopy__(self, memo) -> _Matmul:
        return _Matmul(self.library, self.rows, self.k, self.type, self.layout).store()

    def bind(self, x: torch.Tensor) -> int:
        """Describes the product with x, which is read where it lies; returns its tensor."""
        library = self.library
        self.x, self.y = x, torch.empty(len(x), len(self.rows))
        context = self.context.pointer
        described = library.new_tensor_2d(context, F32, self.k, len(x))
        product = library.mul_mat(context, self.w, described)
        for tensor, memory in ((described, self.x), (product, self.y)):
            buffer = library.backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
            library.backend_tensor_alloc(buffer, tensor, memory.data_ptr())
            self.buffers.append(buffer)
        self.graph = library.new_graph_custom(context, NODES, False)
        library.build_forward_expand(self.graph, product)
        library.backend_cpu_set_n_threads(library.backend, torch.get_num_threads())
        return product

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.x is None:
            self.bind(x)
        assert self.x is x, "bound to another x"
        if self.library.backend_graph_compute(self.library.backend, self.graph) != SUCCESS:
            raise RuntimeError("ggml_backend_graph_compute failed")
        return self.y

    def __del__(self):
        for buffer in self.buffers:
            self.library.backend_buffer_free(buffer)


def _prepare(library: _Library, type: int, layout: int, w: torch.Tensor) -> _Matmul:
    return _Matmul(library, library.quantize(w, type), w.shape[1], type, layout).store()


def _accepts(library: _Library, type: int, layout: int) -> bool:
    """Whether the library can multiply with weights of this type in this layout."""
    if library.device is None:
        return True
    rows = torch.zeros(TINY, library.row_size(type, TINY), dtype=torch.uint8)
    matmul = _Matmul(library, rows, TINY, type, layout)  # kept while the product is looked at
    product = matmul.bind(torch.zeros(1, TINY))
    return library.backend_dev_supports_op(library.device, product)


def _libraries() -> Iterator[tuple[str, str, Path]]:
    """(name, version, path) of each library."""
    if spec := importlib.util.find_spec("llama_cpp"):
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        version = importlib.metadata.version("llama-cpp-python")
        yield "llamacpp", f"llama-cpp-python {version}", folder / "libggml.so"
    for item in filter(None, os.environ.get("MEMLM_GGML", "").split(":")):
        name, _, path = item.partition("=")
        yield name, name, Path(path)


def candidates(bits: int) -> list[Candidate]:
    found = []
    for name, version, path in _libraries():
        library = _Library(path)
        for format, type in library.types(bits).items():
            for suffix, layout in library.layouts.items():
                impl = name + suffix
                if not _accepts(library, type, layout):
                    continue
                found.append(
                    Candidate(
                        impl,
                        format,
                        "i8",
                        ROUNDING[bits],
                        functools.partial(_prepare, library, type, layout),
                        lambda x, stored: stored(x),
                        version=version,
                    )
                )
    if not found:
        raise ImportError("neither llama-cpp-python nor MEMLM_GGML")
    return found
