"""Decoder layers in one call: what the library runs without coming back to Python in between.

The modules stay what they are, and theirs are the tensors; :class:`NativeLayers` holds addresses into
them, and notices when they have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from memlm import _core
from memlm.layers.linear import Linear

MODES = {"accurate": 0, "fast": 1, "w8a8": 2}  # memlm_mode, csrc/include/memlm.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # memlm_dtype


class LayerParts(NamedTuple):
    """A layer of the Llama family: norms' weights ``[hidden]`` and, where queries and keys have
    some, ``[head_dim]``; query, key and value as one linear layer, and gate above up as another.
    ``window``: tokens that a query sees, itself included; 0: all before it."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    window: int


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether calling it computes what ``kind`` says and nothing else."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


def can_run(x: torch.Tensor) -> bool:
    """Whether only values are asked for, of a plain tensor on the CPU: nobody records, compiles,
    casts or counts operations."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.maybe_current_level()
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    )


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _linear(layer: Linear) -> _core.LinearArguments:
    packed = layer.packed  # checks that the tensors hold what n, k and format claim
    return _core.LinearArguments(
        _address(packed.codes),
        _address(packed.scales),
        _address(packed.offsets),
        packed.scales.dtype == torch.float32,
        packed.format.codebook == "nf",
        (packed.n, packed.k, packed.format.group),
        packed.format.bits,
        MODES[layer.mode],
        _address(layer.bias),
    )


def _seen_of(layer: Linear) -> tuple:
    """All of a linear layer that its arguments depend on, but for what never changes."""
    parts, bias = layer._buffers, layer._parameters["bias"]
    return (
        layer,
        layer._mode,
        parts["codes"].data_ptr(),
        parts["scales"].data_ptr(),
        _address(parts["offsets"]),
        _address(bias),
        bias is None or bias.dtype,
    )


def _seen(parts: LayerParts) -> tuple:
    norms = [t for t in parts[:4] if t is not None]
    return (
        [(t.data_ptr(), t.dtype) for t in norms],
        parts.eps,
        [_seen_of(linear) for linear in parts[5:9]],
        parts.window,
    )


class NativeLayers:
    """Decoder layers, one after the other, as one call.

    Raises ValueError for parts that the library does not take: of several dtypes, of columns in an
    order of their own, not on the CPU.
    """

    def __init__(self, layers: Sequence[LayerParts]):
        self._layers = list(layers)  # keeps alive what the addresses point to
        self.dtype = layers[0].input_norm.dtype
        for parts in layers:
            tensors = [*parts[:4], *(linear.bias for linear in parts[5:9])]
            if any(t is not None and t.dtype != self.dtype for t in tensors):
                raise ValueError("layers: norms and biases are of several dtypes")
            if any(linear.order is not None for linear in parts[5:9]):
                raise ValueError("layers: columns are in an order of their own")
            if any(linear.codes.device.type != "cpu" for linear in parts[5:9]):
                raise ValueError("layers: not on the CPU")
        self._tensors = [(*parts[:4], *map(_seen_of, parts[5:9])) for parts in layers]
        self._seen = [_seen(parts) for parts in layers]
        self._native = _core.DecoderLayers([self._arguments(parts) for parts in layers])

    @staticmethod
    def _arguments(parts: LayerParts) -> _core.LayerArguments:
        norms = [_address(t) for t in parts[:4]]
        linears = [_linear(linear) for linear in parts[5:9]]
        return _core.LayerArguments(*norms, parts.eps, *linears, parts.window)

    def are(self, layers: Sequence[LayerParts]) -> bool:
        """Whether these are the layers, with the same tensors and settings."""
        return [_seen(parts) for parts in layers] == self._seen

    def run(self, x: torch.Tensor, step, heads: int, angles, positions: torch.Tensor) -> None:
        """``x [rows, hidden]`` in place, of new tokens whose place in a cache ``step`` says;
        ``angles``: cos and sin f32 ``[n, head_dim / 2]``; ``positions`` int64 ``[rows]``: the row of
        both that each token takes."""
        cos, sin = angles
        self._native(...)
