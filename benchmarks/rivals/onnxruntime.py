"""ONNX Runtime: ``MatMulNBits`` (groups of 32; activations in f32, or rounded to int8) and
``DynamicQuantizeMatMul`` (a scale per row of W, one for all of x)."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from ..harness import ROUNDING, Candidate
from . import pairs, rounded

CONTRIB = "com.microsoft"
FLOAT, INT8 = 0, 4  # values of MatMulNBits' attribute accuracy_level: the activations' type


class _Session:
    """A model of one node ``x [m, k] -> y [m, n]`` with its weights, and a session that runs it."""

    def __init__(self, model: bytes, n: int, nbytes: int):
        self.model, self.n, self.nbytes = model, n, nbytes
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.x = None

    @classmethod
    def of(cls, node, weights: dict[str, np.ndarray], n: int, k: int) -> _Session:
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size])
            for name, size in (("x", k), ("y", n))
        ]
        constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        graph = helper.make_graph([node], "matmul", values[:1], values[1:], constants)
        versions = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=10)
        nbytes = sum(value.nbytes for value in weights.values())
        return cls(model.SerializeToString(), n, nbytes)

    def __deepcopy__(self, memo) -> _Session:
        return _Session(self.model, self.n, self.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.x is not x:  # bound once: neither x nor y is copied
            self.x, self.y = x, torch.empty(len(x), self.n)
            self.binding = self.session.io_binding()
            for bind, name, tensor in (
                (self.binding.bind_input, "x", self.x),
                (self.binding.bind_output, "y", self.y),
            ):
                bind(name, "cpu", 0, np.float32, list(tensor.shape), tensor.data_ptr())
        self.session.run_with_iobinding(self.binding)
        return self.y


def _nbits(w: torch.Tensor, bits: int, accuracy_level: int) -> _Session:
    n, k = w.shape
    codes, scales = rounded(w, f"int{bits}-g32")
    codes = pairs(codes) if bits == 4 else (codes.short() + 128).to(torch.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain=CONTRIB,
        N=n, K=k, bits=bits, block_size=32, accuracy_level=accuracy_level,
    )  # fmt: skip
    weights = {"codes": codes.reshape(n, k // 32, -1).numpy(), "scales": scales.numpy()}
    return _Session.of(node, weights, n, k)


def _dynamic(w: torch.Tensor) -> _Session:
    codes, scales = rounded(w, "int8-row")
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "codes", "scales"], ["y"], domain=CONTRIB
    )
    weights = {"codes": codes.T.contiguous().numpy(), "scales": scales[:, 0].numpy()}
    return _Session.of(node, weights, *w.shape)


def candidates(bits: int) -> list[Candidate]:
    version = f"onnxruntime {onnxruntime.__version__}"
    found = [
        Candidate(
            impl,
            f"int{bits}-g32",
            arithmetic,
            ROUNDING[bits],
            lambda w, level=level: _nbits(w, bits, level),
            lambda x, stored: stored(x),
            version=version,
        )
        for impl, arithmetic, level in (
            ("onnxruntime", "i8", INT8),
            ("onnxruntime_float", "f32", FLOAT),
        )
    ]
    if bits == 8:
        found.append(
            Candidate(
                "onnxruntime_dynamic",
                "int8-row",
                "i8",
                ROUNDING[bits],
                _dynamic,
                lambda x, stored: stored(x),
                version=version,
            )
        )
    return found
