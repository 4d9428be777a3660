"""bitsandbytes: ``Linear4bit``, NF4 in groups of 64, in bf16 (its CPU kernel has no other)."""

from __future__ import annotations

import bitsandbytes
import torch

from ..harness import ROUNDING, Candidate, Sized


def _prepare(w: torch.Tensor) -> Sized:
    n, k = w.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16)
    layer.weight = bitsandbytes.nn.Params4bit(
        w.bfloat16(), requires_grad=False, blocksize=64, quant_type="nf4",
        compress_statistics=False,
    )  # fmt: skip
    layer = layer.to("cpu").eval()  # rounds
    layer(torch.zeros(1, k, dtype=torch.bfloat16))  # packs, where there is a kernel that wants it
    return Sized(layer, layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes)


def candidates(bits: int) -> list[Candidate]:
    if bits != 4:
        return []
    return [
        Candidate(
            "bitsandbytes",
            "nf4-g64",
            "f32",
            ROUNDING[4],
            _prepare,
            lambda x, stored: stored.value(x),
            torch.bfloat16,
            f"bitsandbytes {bitsandbytes.__version__}",
        )
    ]
