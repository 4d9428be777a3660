"""Pruning: smaller models, and models with zeros."""

from memlm.prune.config import PruneConfig
from memlm.prune.pruning import prune_
from memlm.prune.recover import recover_
from memlm.prune.report import LayerReport, PruneReport
from memlm.prune.schedule import GradualPruning
from memlm.prune.structured import Removal, remove_

__all__ = [
    "GradualPruning", "LayerReport", "PruneConfig", "PruneReport", "Removal", "prune_", "recover_",
    "remove_",
]  # fmt: skip
