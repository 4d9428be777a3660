"""Matrices with zeros for the tests of sparse formats and their operations."""

import torch
from torch import nn

from memlm.sparse_formats import SparseFormat


def mask(format: SparseFormat, n: int, k: int, density: float, seed: int = 0) -> torch.Tensor:
    """bool [n, k]: weights that the pattern has a place for, about ``density`` of all, or with 2:4 of
    the two in four."""
    generator = torch.Generator().manual_seed(seed)
    if format.pattern == "block":
        kept = torch.rand(-(-n // 16), -(-k // 32), generator=generator) < density
        kept = kept.repeat_interleave(16, dim=0).repeat_interleave(32, dim=1)
    elif format.pattern == "2:4":
        order = torch.rand(n, -(-k // 4), 4, generator=generator).argsort(2)
        kept = (order < 2) & (torch.rand(order.shape, generator=generator) < density)
        kept = kept.flatten(1)
    else:
        kept = torch.rand(n, k, generator=generator) < density
    return kept[:n, :k].contiguous()


def random_weights(
    format: SparseFormat, n: int, k: int, density: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """f32 [n, k] with zeros as in :func:`mask`; the first weight is never one of them."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    kept = mask(format, n, k, density, seed)
    kept[0, 0] |= density > 0 and not kept[0, :4].any()
    return w * kept


def prune_(model: nn.Module, format: str, density: float = 0.5) -> nn.Module:
    """Zeros as in :func:`mask` in every linear layer but the head, in place."""
    format = SparseFormat.parse(format)
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            kept = mask(format, *module.weight.shape, density, seed)
            with torch.no_grad():
                module.weight.masked_fill_(~kept, 0)
    return model
