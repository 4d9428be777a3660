"""The candidates of ``bench_w4_matmul`` and ``bench_w8_matmul`` besides the other libraries':
memlm, torch's float matmul, and torch's own low-bit CPU operations."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from memlm import ops

from .harness import ROUNDING, Candidate, packed

SHAPES, MS = "4096x4096,1536x576,49152x576", "1,4,16,32,128,512"
PYTEST_SHAPES, PYTEST_MS = [(4096, 4096)], [1, 512]
BASELINE = "torch_f32"


def memlm_candidates(formats: list[str]) -> list[Candidate]:
    """``memlm`` (fast mode) and ``memlm_accurate`` for each format."""
    return [
        packed(name, lambda x, w, mode=mode: ops.matmul(x, w, mode=mode), impl, arithmetic)
        for name in formats
        for impl, mode, arithmetic in (("memlm", "fast", "i8"), ("memlm_accurate", "accurate", "f32"))
    ]


def memlm_w8a8() -> list[Candidate]:
    """``memlm``, with one scale per row of W and of x."""
    return [packed("int8-row", lambda x, w: ops.matmul(x, w, mode="w8a8"), arithmetic="i8")]


def torch_float() -> list[Candidate]:
    """``torch_f32``, ``torch_bf16``: what a user has before quantising."""
    return [
        Candidate(
            f"torch_{name}",
            name,
            "f32",
            0.02,
            lambda w, dtype=dtype: w.to(dtype),
            F.linear,
            dtype,
        )
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))
    ]


def torch_int4() -> list[Candidate]:
    """torch's 4-bit CPU matmul: asymmetric groups of 32, dequantised in the kernel; in bf16, since
    for f32 it has only a scalar loop, 70 times slower at m=512."""

    def prepare(w):
        n, k = w.shape
        groups = w.view(n, -1, 32)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / 15
        q = ((groups - low) / scale).round().clamp(0, 15).int().view(n, k)
        packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
        scales_and_zeros = torch.cat((scale, low + 8 * scale), -1).transpose(0, 1)  # [g, n, 2]
        return packed, scales_and_zeros.to(torch.bfloat16).contiguous()

    return [
        Candidate(
            "torch_int4pack",
            "int4a-g32",
            "f32",
            ROUNDING[4],
            prepare,
            lambda x, stored: torch._weight_int4pack_mm_for_cpu(x, stored[0], 32, stored[1]),
            torch.bfloat16,
        )
    ]


@contextlib.contextmanager
def _engine(name: str):
    """What torch prepares 8-bit weights for."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    yield
    torch.backends.quantized.engine = before


@dataclass
class _Prepacked:
    """Weights that torch prepared for an engine, and multiplies with it."""

    value: Any
    nbytes: int
    engine: str

    def __deepcopy__(self, memo) -> _Prepacked:
        with _engine(self.engine):  # a copy is prepared again
            return _Prepacked(copy.deepcopy(self.value), self.nbytes, self.engine)


def torch_int8() -> list[Candidate]:
    """torch's 8-bit CPU matmuls, one scale per row: weight-only, and with dynamically quantised
    activations (one scale per tensor) by both engines, fbgemm and oneDNN."""

    def prepare(w):
        scale = w.abs().amax(1) / 127
        return (w / scale[:, None]).round().to(torch.int8), scale.to(torch.bfloat16)

    def prepare_dynamic(w, engine):
        scale = (w.abs().amax(1) / 127).double()
        with _engine(engine), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates these tensors, not the operation
            zero = torch.zeros(len(w), dtype=torch.int64)
            q = torch.quantize_per_channel(w, scale, zero, 0, torch.qint8)
            value = torch.ops.quantized.linear_prepack(q, None)
        return _Prepacked(value, w.numel() + 4 * len(w), engine)

    return [
        Candidate(
            "torch_int8pack",
            "int8-row",
            "f32",
            ROUNDING[8],
            prepare,
            lambda x, stored: torch._weight_int8pack_mm(x, *stored),
            torch.bfloat16,
        ),
        *(
            Candidate(
                f"torch_{engine}_int8",
                "int8-row",
                "i8",
                ROUNDING[8],
                lambda w, engine=engine: prepare_dynamic(w, engine),
                lambda x, stored: torch.ops.quantized.linear_dynamic(x, stored.value, False),
            )
            for engine in ("fbgemm", "onednn")
        ),
    ]
