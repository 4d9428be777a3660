"""Decoder layers in one call: what the library runs without coming back to Python in between.

The modules stay what they are, and theirs are the tensors: :class:`NativeLayers` holds addresses
into them, and :class:`Watch` says whether those are still good.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from memlm import _core
from memlm.formats import ACT_GROUP
from memlm.kv_cache import PagedKVCache, Step
from memlm.layers.linear import Linear
from memlm.layers.sparse import SparseLinear
from memlm.ops.matmul_topk import MODES

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # memlm_dtype
PATTERNS = (None, "2:4", "unstructured", "block")  # memlm_pattern
LINEARS = (Linear, SparseLinear)


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


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether calling it computes what one of ``kinds`` says and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) in kinds and not hooks and "forward" not in module.__dict__


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
    format, values = packed.format, getattr(packed.format, "values", packed.format)
    return _core.LinearArguments(
        *map(_address, (packed.codes, packed.scales, packed.offsets)),
        packed.scales is not None and packed.scales.dtype == torch.float32,
        getattr(values, "codebook", "") == "nf",
        (packed.n, packed.k, getattr(values, "group", ACT_GROUP)),
        format.bits,
        MODES.index(layer.mode),
        _address(layer.bias),
        PATTERNS.index(getattr(format, "pattern", None)),
        _address(getattr(packed, "starts", None)),
        _address(getattr(packed, "places", None)),
    )


class Watch:
    """Notices when modules, or the tensors they hold, are no longer what they were: in some 0.1 us
    for each, since it is asked before every token."""

    def __init__(self, roots: Iterable[nn.Module]):
        modules = [module for root in roots for module in root.modules()]
        self._children = [
            (m._modules, name, child) for m in modules for name, child in m._modules.items()
        ]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules]
        self._linears = [m for m in modules if isinstance(m, Linear)]
        self._eps = [own for own in self._own if "eps" in own]  # norms
        held = [(d, name) for m in modules for d in (m._parameters, m._buffers) for name in d]
        self._tensors = [(d, name) for d, name in held if d[name] is not None]
        self._absent = [(d, name) for d, name in held if d[name] is None]
        self._seen = self._look()

    def _look(self) -> tuple:
        tensors = [d[name] for d, name in self._tensors]
        return (
            [t.data_ptr() for t in tensors],
            [t.dtype for t in tensors],
            [linear._mode for linear in self._linears],
            [own["eps"] for own in self._eps],
        )

    def unchanged(self) -> bool:
        try:
            return (
                not any(self._hooks)
                and all([d[name] is child for d, name, child in self._children])
                and all([d[name] is None for d, name in self._absent])
                and not any(["forward" in own for own in self._own])
                and self._look() == self._seen
            )
        except (KeyError, AttributeError):  # something is gone
            return False


class NativeLayers:
    """Decoder layers, one after the other, as one call.

    Raises ValueError for parts that the library does not take: of several dtypes, of columns in an
    order of their own, not on the CPU.
    """

    def __init__(self, layers: Sequence[LayerParts]):
        self._layers = list(layers)  # keeps alive what the addresses point to
        self.dtype, self.hidden = layers[0].input_norm.dtype, layers[0].o.n
        for parts in layers:
            tensors = [*parts[:4], *(linear.bias for linear in parts[5:9])]
            if any(t is not None and t.dtype != self.dtype for t in tensors):
                raise ValueError("layers: norms and biases are of several dtypes")
            if any(linear.order is not None for linear in parts[5:9]):
                raise ValueError("layers: columns are in an order of their own")
            if any(linear.codes.device.type != "cpu" for linear in parts[5:9]):
                raise ValueError("layers: not on the CPU")
        self._native = _core.DecoderLayers([self._arguments(parts) for parts in layers])

    @staticmethod
    def _arguments(parts: LayerParts) -> _core.LayerArguments:
        norms = [_address(t) for t in parts[:4]]
        linears = [_linear(linear) for linear in parts[5:9]]
        return _core.LayerArguments(*norms, parts.eps, *linears, parts.window)

    def run(
        self,
        x: torch.Tensor,
        cache: PagedKVCache,
        step: Step,
        angles: torch.Tensor,
        first: int = 0,
        by_row: bool = False,
    ) -> None:
        """A step's new tokens ``x [rows, hidden]`` through the layers, which are the cache's from
        number ``first`` on, in place.

        ``angles`` f32 ``[positions, 3, head_dim / 2]`` (:class:`memlm.models.decoder.Rotary`), or with
        ``by_row`` ``[rows, 3, head_dim / 2]``.  Raises ValueError for what does not fit together; then
        nothing has changed.
        """
        format, half = cache.format, cache.format.dim // 2
        own = slice(first, first + len(self._layers))
        pools, tails = cache.pools[own], cache.tails[own]
        if len(pools) != len(self._layers):
            raise ValueError(
                f"cache: has {len(cache.pools)} layers, these are {len(self._layers)} from {first} on"
            )
        if x.shape != (len(step.positions), self.hidden) or x.dtype != self.dtype:
            raise ValueError(
                f"x: got {x.dtype} {list(x.shape)}, expected {self.dtype} "
                f"{[len(step.positions), self.hidden]}"
            )
        sine = angles.data_ptr() + half * angles.element_size()
        self._native(
            [pool.data_ptr() for pool in pools],
            [t.data_ptr() for t in tails],
            (
                cache.count,
                format.tokens,
                cache.kv_heads,
                format.dim,
                format.index,
                format.block_bytes,
                tails[0].shape[1] if tails else 0,
                format.tail.block_bytes if tails else 0,
            ),
            len(step.sequences),
            step.rows.data_ptr(),
            step.lengths.data_ptr(),
            step.tables.data_ptr(),
            step.tables.shape[1],
            _address(step.tail_of),
            x.data_ptr(),
            self.hidden,
            DTYPES[x.dtype],
            self.hidden,
            self._layers[0].o.k // format.dim,
            sine + half * angles.element_size(),
            sine,
            len(angles),
            3 * half,
            0 if by_row else step.positions.data_ptr(),
            torch.get_num_threads(),
        )
