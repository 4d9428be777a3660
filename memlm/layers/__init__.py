"""Drop-in layers over packed weights."""

from memlm.layers.embedding import Embedding
from memlm.layers.fused import Projections, Stacked, SwiGLU
from memlm.layers.linear import Linear
from memlm.layers.packed import PackedModule, PackedWeight
from memlm.layers.sparse import SparseLinear, linear_of

__all__ = [
    "Embedding", "Linear", "PackedModule", "PackedWeight", "Projections", "SparseLinear", "Stacked",
    "SwiGLU", "linear_of",
]  # fmt: skip
