"""Other libraries' matmuls as candidates, a module for each library.

A module has ``candidates(bits)``: its ways to multiply with weights of 4 or 8 bits.  They round the
weights as memlm does where their format is one of memlm's, so that errors compare arithmetic.
"""

from __future__ import annotations

import importlib

import torch

from memlm import formats

from ..harness import Candidate, out, quantized

LIBRARIES = ("torchao", "onnxruntime", "openvino", "bitsandbytes", "ggml")


def candidates(bits: int, libraries: tuple[str, ...] = LIBRARIES) -> list[Candidate]:
    """Those of all libraries that are installed; a message names the others."""
    found = []
    for name in libraries:
        try:
            found += importlib.import_module(f"{__name__}.{name}").candidates(bits)
        except ImportError as error:
            out.print(f"{name}: left out ({error})")
    return found


def rounded(w: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[n, k]`` (0..15 or -127..127) and f32 scales ``[n, groups]`` of a symmetric format.

    Raises RuntimeError where k is no whole number of groups.
    """
    format = formats.Format.parse(format)
    if w.shape[1] % (format.group or 1):
        raise RuntimeError(f"k: got {w.shape[1]}, a multiple of {format.group} is needed")
    codes, scales, _ = formats.unpack(quantized(w, format))
    return codes, scales.float()


def pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 ``[n, k]`` -> bytes ``[n, k / 2]``, the first of two in the low nibble."""
    return codes[:, 0::2] | codes[:, 1::2] << 4
