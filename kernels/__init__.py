"""The GPU kernels in Triton: for NVIDIA from compute capability 7.5 on and for AMD.

One file for each operation, named as it; what several share begins with an underscore.  Importing the
package needs no Triton; :func:`implementation` does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

# Operations of memlm.ops that have a Triton kernel.
OPERATIONS = (
    "adamw_8bit", "attention", "attention_backward", "block_sparse_grad_values",
    "block_sparse_grad_x", "block_sparse_matmul", "dequantize", "embedding", "kv_append",
    "linear_cross_entropy", "linear_cross_entropy_backward", "matmul_topk", "paged_attention",
    "quantize_rows", "quantize_weight", "w2_matmul", "w4_matmul", "w4_sparse_dequantize",
    "w4_sparse_matmul", "w8_matmul", "w8a8_matmul",
)  # fmt: skip



class UnsupportedError(TypeError):
    """A kernel does not take arguments that the operation allows."""


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def implementation(name: str) -> Callable:
    """The callable that runs operation ``name`` in Triton, with the arguments of
    ``torch.ops.memlm.<name>``.

    Raises ValueError for an operation without kernel, ImportError without Triton.
    """
    if name not in OPERATIONS:
        raise ValueError(f"name: got {name!r}, Triton kernels exist for {OPERATIONS}")
    if not available():
        raise ImportError("memlm.kernels needs Triton: pip install 'memlm[gpu]'")
    return getattr(import_module(f"memlm.kernels.{name}"), name)
