"""Codes of 2, 4 or 8 bits in int32 words, the first in the lowest bits, as compressed-tensors and
GPTQ store them."""

from __future__ import annotations

import torch

WORD = 32  # bits


def words(count: int, bits: int) -> int:
    """Words that hold ``count`` codes."""
    return -(-count * bits // WORD)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 ``[..., words(count, bits)]`` -> uint8 ``[..., count]``."""
    octets = _adjacent(packed).view(torch.uint8)  # little-endian, as this library's CPUs are
    if bits < 8:
        fields = [octets >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        octets = torch.stack(fields, dim=-1).flatten(-2)
    return octets[..., :count]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[..., count]`` of values below ``2 ** bits`` -> int32 ``[..., words(count, bits)]``,
    the last word filled up with zeros."""
    missing = -codes.shape[-1] % (WORD // bits)
    fields = torch.nn.functional.pad(codes, (0, missing)).unflatten(-1, (-1, 8 // bits))
    octets = fields[..., 0]
    for i in range(1, 8 // bits):
        octets = octets | fields[..., i] << i * bits
    return _adjacent(octets).view(torch.int32)


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    """A copy with stride 1 in the last dimension, also where that has one element (there
    ``contiguous`` leaves any stride)."""
    return x.clone(memory_format=torch.contiguous_format)
