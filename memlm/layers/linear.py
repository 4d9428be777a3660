"""A linear layer over packed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from memlm.formats import Format, Packed
from memlm.layers.packed import PackedModule, dequantize_ordered
from memlm.ops import dispatch, matmul_topk, mode_for
from memlm.quantize import quantize_weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear layer whose weight is ``[in, out]`` (known
    without importing transformers)."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight ``[out, in]`` of a ``torch.nn.Linear`` or a Conv1D.  Raises TypeError for another
    module."""
    if isinstance(module, nn.Linear):
        return module.weight
    if is_conv1d(module):
        return module.weight.T
    raise TypeError(
        f"linear: got {type(module).__name__}, accepted are torch.nn.Linear and Conv1D (transformers)"
    )


class Linear(PackedModule):
    """``y = x W^T + bias`` for a packed ``W [out_features, in_features]``: takes the place of
    ``torch.nn.Linear``.

    x is ``[..., in_features]`` in f32, bf16 or f16, and so is y.  The weights are frozen;
    gradients flow to x and to the bias (as training LoRA adapters around the layer needs).
    ``mode`` is ``"fast"`` or ``"accurate"``, see :func:`memlm.ops.w4_matmul`, or for 8 bits
    ``"w8a8"``, :func:`memlm.ops.w8a8_matmul` with one scale per row of x; None takes fast for 2 and
    4 bits and accurate for 8.  It may be changed at any time.

    ``order``, int32 [k]: column j of the packed W multiplies ``x[..., order[j]]`` (checkpoints whose
    groups were formed in the order of the activations' size, GPTQ's ``desc_act``).
    """

    def __init__(
        self,
        packed: Packed,
        bias: torch.Tensor | None = None,
        mode: str | None = None,
        dtype: torch.dtype = torch.float32,
        order: torch.Tensor | None = None,
    ):
        super().__init__(packed, dtype, order)
        if bias is not None and tuple(bias.shape) != (packed.n,):
            raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{packed.n}]")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self.mode = mode_for(packed.format, mode)

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias=None,
        mode: str | None = None,
        dtype: torch.dtype = torch.float32,
        order: torch.Tensor | None = None,
    ) -> Linear:
        """A layer over an already packed matrix and an optional ``bias [n]``."""
        return cls(packed, bias, mode, dtype, order)

    @classmethod
    def from_float(
        cls, linear: nn.Module, format: str | Format, mode: str | None = None
    ) -> Linear:
        """Quantises a ``torch.nn.Linear``, or a Conv1D of Hugging Face (whose weight is
        ``[in, out]``).  The bias parameter is taken over, not copied.

        Raises TypeError for another module, and what :func:`memlm.quantize_weight` raises.
        """
        mode = mode_for(Format.parse(format), mode)
        packed = quantize_weight(linear_weight(linear), format)
        return cls(packed, linear.bias, mode, linear.weight.dtype)

    @property
    def in_features(self) -> int:
        return self.k

    @property
    def out_features(self) -> int:
        return self.n

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode = mode_for(self.format, mode)

    @property
    def op(self) -> str:
        """The operation that forward runs."""
        return "w8a8_matmul" if self._mode == "w8a8" else f"w{self.format.bits}_matmul"

    def forward(
        self,
        x: torch.Tensor,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        swiglu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``; with the layers around it, where they
        are given, as :func:`memlm.ops.w4_matmul` says."""
        parts, bias = self._buffers, self._parameters["bias"]  # attributes of modules are slow
        x, norm = self._ordered(x, norm, eps)
        weights = (parts["codes"], parts["scales"], parts["offsets"], self.n, self.k)
        around = (norm, eps, swiglu, residual)
        return dispatch(x, self.format, *weights, bias, self._mode, *around)

    def topk(
        self, x: torch.Tensor, k: int, norm: torch.Tensor | None = None, eps: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` largest elements of each row of :meth:`forward`'s result, in f32, and where they
        stand, both ``[..., k]``, without the others: :func:`memlm.ops.matmul_topk`."""
        x, norm = self._ordered(x, norm, eps)
        format, packed = self.format, self._buffers
        return matmul_topk(
            x, packed["codes"], packed["scales"], packed["offsets"], format.bits, self.n, self.k,
            format.group, self._parameters["bias"], self._mode, norm, eps, k,
            "nf" if format.codebook == "nf" else "int",
        )  # fmt: skip

    def _ordered(self, x: torch.Tensor, norm: torch.Tensor | None, eps: float):
        """x with its columns where W has them, and the norm that is left to apply."""
        order = self._buffers["order"]
        if order is None:
            return x, norm
        if norm is not None:
            x, norm = F.rms_norm(x, (self.k,), norm, eps), None
        return x.index_select(-1, order), norm

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The ``torch.nn.Linear`` with the dequantised weights, in f32, bf16 or f16."""
        linear = nn.Linear(self.k, self.n, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(dequantize_ordered(self.packed, dtype, self.order))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.k}, out_features={self.n}, bias={self.bias is not None}, "
            f"format={self.format}, mode={self.mode}"
        )
