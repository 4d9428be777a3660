"""ggml's tensor types, as GGUF files hold them (https://github.com/ggml-org/ggml,
src/ggml-common.h and the dequantize_row functions of src/ggml-quants.c).

Blocks stand one behind the other along a row.  d, m are f16; all other fields bytes.

    Q8_0     32  d | q[32] int8                           w = d q
    Q4_0     32  d | q[16]                                w = d (q - 8)
    Q4_1     32  d | m | q[16]                            w = d q + m
    Q5_0     32  d | h[4] | q[16]                         w = d (q - 16)
    Q5_1     32  d | m | h[4] | q[16]                     w = d q + m
    IQ4_NL   32  d | q[16]                                w = d IQ4_NL[q]
    Q4_K    256  d | m | s[12] | q[128]                   w = d s q - m t     s, t: 6 bits for each 32
    Q5_K    256  d | m | s[12] | h[32] | q[128]           the same
    Q6_K    256  q[128] | h[64] | s[16] int8 | d          w = d s (q - 32)    s: for each 16

Byte i of q[16] has value i in its low nibble and value i + 16 in the high one; bit i of h is bit 4 of
value i.  The larger blocks go likewise in runs of 64 (K of 4 and 5 bits) and 128 values (6 bits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Blocks -> codes [blocks, values], scales and offsets (or None) [blocks, groups]:
# w = scale * code + offset, the products exact in f32.
Decode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class TensorType:
    """``block``: one block as stored (of a float type one value), of ``values`` values; ``decode``
    says what blocks hold; ``format``: the format of memlm that holds the same numbers, ``zero``
    being what its codes have added."""

    name: str
    block: torch.dtype | np.dtype
    values: int = 1
    decode: Decode | None = None
    format: str | None = None
    zero: int = 0


def _block(*fields) -> np.dtype:
    return np.dtype(list(fields))


def _nibbles(q: np.ndarray) -> np.ndarray:
    """[..., bytes] -> [..., 2 * bytes]: all low nibbles, then all high ones."""
    return np.concatenate((q & 15, q >> 4), axis=-1)


def _bits(h: np.ndarray, shift: int) -> np.ndarray:
    """[blocks, 4], bit i for value i -> [blocks, 32] of 0 or 1 << shift."""
    return np.unpackbits(h, axis=-1, bitorder="little") << shift


def _d(blocks: np.ndarray, field: str = "d") -> np.ndarray:
    return blocks[field][:, None]


def _q8_0(b):
    return b["q"], _d(b), None


def _q4_0(b):
    return (_nibbles(b["q"]) - np.uint8(8)).view(np.int8), _d(b), None


def _q4_1(b):
    return _nibbles(b["q"]), _d(b), _d(b, "m")


def _q5_0(b):
    return ((_nibbles(b["q"]) | _bits(b["h"], 4)) - np.uint8(16)).view(np.int8), _d(b), None


def _q5_1(b):
    return _nibbles(b["q"]) | _bits(b["h"], 4), _d(b), _d(b, "m")


def _iq4_nl(b):
    return np.array(IQ4_NL, np.int8)[_nibbles(b["q"])], _d(b), None


def _k_scales(b):
    """Scales and offsets of Q4_K and Q5_K.  The 12 bytes hold, for 32-value runs j of 8,
    s_j (j < 4) in the low 6 bits of byte j and t_j in those of byte j + 4; of j >= 4 the low 4 bits
    in the nibbles of byte j + 4, s low and t high, and the two above in the top of bytes j - 4, j."""
    s = b["s"]
    low, middle, high = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6) << 4), axis=1)
    offsets = np.concatenate((middle & 63, (high >> 4) | (middle >> 6) << 4), axis=1)
    # f16 times 6 bits: exact in f32
    return _d(b).astype(np.float32) * scales, -_d(b, "m").astype(np.float32) * offsets


def _q4_k(b):
    return _nibbles(b["q"].reshape(-1, 4, 32)).reshape(-1, 256), *_k_scales(b)


def _q5_k(b):
    q = _nibbles(b["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    runs = np.arange(8, dtype=np.uint8)[:, None]
    return (q | (b["h"][:, None] >> runs & 1) << 4).reshape(-1, 256), *_k_scales(b)


def _q6_k(b):
    low = _nibbles(b["q"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = b["h"].reshape(-1, 2, 1, 32) >> shifts & 3
    q = ((low | high << 4) - np.uint8(32)).view(np.int8)
    return q.reshape(-1, 256), _d(b).astype(np.float32) * b["s"], None


_D, _M = ("d", "<f2"), ("m", "<f2")
# By ggml's number.
TYPES = {
    0: TensorType("F32", torch.float32),
    1: TensorType("F16", torch.float16),
    30: TensorType("BF16", torch.bfloat16),
    8: TensorType("Q8_0", _block(_D, ("q", "i1", 32)), 32, _q8_0, "int8-g32"),
    2: TensorType("Q4_0", _block(_D, ("q", "u1", 16)), 32, _q4_0, "int4-g32", 8),
    3: TensorType("Q4_1", _block(_D, _M, ("q", "u1", 16)), 32, _q4_1, "int4a-g32"),
    6: TensorType("Q5_0", _block(_D, ("h", "u1", 4), ("q", "u1", 16)), 32, _q5_0, "int8-g32"),
    7: TensorType("Q5_1", _block(_D, _M, ("h", "u1", 4), ("q", "u1", 16)), 32, _q5_1),
    20: TensorType("IQ4_NL", _block(_D, ("q", "u1", 16)), 32, _iq4_nl, "int8-g32"),
    12: TensorType(
        "Q4_K", _block(_D, _M, ("s", "u1", 12), ("q", "u1", 128)), 256, _q4_k, "int4a-g32"
    ),
    13: TensorType(
        "Q5_K", _block(_D, _M, ("s", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)), 256, _q5_k
    ),
    14: TensorType(
        "Q6_K", _block(("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), _D), 256, _q6_k
    ),
}


def dequantize(type: TensorType, blocks: np.ndarray) -> np.ndarray:
    """f32 [blocks, values]; NaN where a scale is NaN or Inf."""
    with np.errstate(invalid="ignore"):
        q, scales, offsets = type.decode(blocks)
        grouped = q.reshape(*scales.shape, -1) * scales.astype(np.float32)[..., None]
        if offsets is not None:
            grouped += offsets.astype(np.float32)[..., None]
    return grouped.reshape(q.shape)
