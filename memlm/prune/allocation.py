"""How much each layer can spare, when all together shall have one sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from memlm.prune.config import PruneConfig
from memlm.prune.gram import Gram


def allocate(
    layers: Iterable[tuple[str, torch.Tensor, Gram]],
    chosen: Mapping[str, float],
    config: PruneConfig,
) -> dict[str, float]:
    raise NotImplementedError
