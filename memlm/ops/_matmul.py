"""What ``w4_matmul`` and ``w8_matmul`` share: argument checks, the torch reference, the gradient,
autocast and registration.  The two files beside this one hold what differs: schema and docstring.
"""

from __future__ import annotations

import torch

from memlm import formats
from memlm.formats import ACT_GROUP, Format, Packed

X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of W dequantised at a time where a float copy is needed (the gradient): 1,024 rows of 4,096
# are 16 MB of f32.
GRAD_ROWS = 1024


def check(x, packed: Packed, bias) -> tuple[int, ...]:
    """Raises TypeError or ValueError naming the argument that does not fit; returns y's shape."""
    if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, accepted are tensors of {X_DTYPES}")
    if x.dim() < 1 or x.shape[-1] != packed.k:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., {packed.k}]")
    for name, tensor in packed.tensors().items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
    if bias is not None:
        if not isinstance(bias, torch.Tensor) or bias.dtype != x.dtype:
            got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
            raise TypeError(f"bias: got {got}, expected {x.dtype}, as x")
        if tuple(bias.shape) != (packed.n,):
            raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{packed.n}]")
        if bias.device != x.device:
            raise ValueError(f"bias: on {bias.device}, but x is on {x.device}")
    return (*x.shape[:-1], packed.n)


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [m, k]`` f32 -> int8 codes ``[m, groups, 32]`` and f32 scales ``[m, groups, 1]``.

    Symmetric, one scale per 32 consecutive k: ``s = amax / 127``, ``q = rint(x * (127 / amax))``,
    the rounding of the CPU kernels to the last bit.  A group whose amax is so small that 127 / amax
    overflows has scale and codes 0; a group holding Inf or NaN makes its whole row NaN.
    """
    m, k = x.shape
    padded = x.new_zeros(m, -(-k // ACT_GROUP) * ACT_GROUP)
    padded[:, :k] = x
    groups = padded.view(m, -1, ACT_GROUP)
    amax = groups.abs().amax(-1, keepdim=True)
    inverse = 127 / amax
    tiny = torch.isinf(inverse)
    scale = torch.where(tiny, 0.0, amax / 127)
    scale = torch.where(torch.isfinite(amax), scale, torch.nan)
    q = (groups * torch.where(tiny | ~torch.isfinite(scale), 0.0, inverse)).nan_to_num(0.0).round()
    return q, scale


def reference(x: torch.Tensor, packed: Packed, bias, fast: bool) -> torch.Tensor:
    """The operation in plain torch: what the kernels are measured against."""
    rows = x.reshape(-1, packed.k).float()
    if fast:
        q, scale = quantize_activations(rows)
        rows = (q * scale).view(rows.shape[0], -1)[:, : packed.k]
    y = rows @ formats.dequantize(packed).T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], packed.n)
