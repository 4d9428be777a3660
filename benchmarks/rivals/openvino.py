"""OpenVINO: a MatMul with compressed weights, as its plugin runs it by default (in bf16 where the
CPU has it) and with activations rounded to int8 (``DYNAMIC_QUANTIZATION_GROUP_SIZE``)."""

from __future__ import annotations

import numpy as np
import openvino
import torch
from openvino import opset13 as ops

from ..harness import ROUNDING, Candidate
from . import pairs, rounded

FORMATS = {4: "int4-g32", 8: "int8-row"}
# Activations are rounded to int8 only where the model's precision is f32.
DYNAMIC = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}


class _Model:
    """``W [n, k]`` as codes times scales, ``[n, groups, group]``, compiled with a MatMul."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, options: dict):
        self.codes, self.scales, self.options = codes, scales, options
        n, k = codes.shape
        groups = scales.shape[1]
        shape = [n, groups, k // groups]
        if codes.dtype == torch.uint8:
            # 0..15 -> two's complement of -8..7; kept, for the constant only points to it
            self.signed = pairs(codes ^ 8).numpy()
            constant = ops.constant(openvino.Tensor(self.signed, shape, openvino.Type.i4))
            self.nbytes = self.signed.nbytes
        else:
            constant = ops.constant(codes.view(shape).numpy())
            self.nbytes = codes.nbytes
        half = scales.view(n, groups, 1).half().numpy()
        self.nbytes += half.nbytes
        w = ops.multiply(ops.convert(constant, "f16"), ops.constant(half))
        w = ops.convert(ops.reshape(w, ops.constant(np.array([n, k])), False), "f32")
        x = ops.parameter([-1, k], np.float32)
        model = openvino.Model([ops.matmul(x, w, False, True)], [x], "matmul")
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
        self.compiled = openvino.Core().compile_model(model, "CPU", {**threads, **options})
        self.request = self.compiled.create_infer_request()
        self.x = None

    def __deepcopy__(self, memo) -> _Model:
        return _Model(self.codes, self.scales, self.options)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.x is not x:  # bound once: neither x nor y is copied
            self.x, self.y = x, torch.empty(len(x), len(self.codes))
            self.request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
            self.request.set_output_tensor(openvino.Tensor(self.y.numpy(), shared_memory=True))
        self.request.infer()
        return self.y


def candidates(bits: int) -> list[Candidate]:
    return [
        Candidate(
            impl,
            FORMATS[bits],
            arithmetic,
            ROUNDING[bits],
            lambda w, options=options: _Model(*rounded(w, FORMATS[bits]), options),
            lambda x, stored: stored(x),
            version=f"openvino {openvino.__version__.split('-')[0]}",
        )
        for impl, arithmetic, options in (
            ("openvino", "f32", {}),
            ("openvino_dynamic", "i8", DYNAMIC),
        )
    ]
