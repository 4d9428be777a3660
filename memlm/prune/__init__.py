"""Pruning: smaller models, and models with zeros."""

from memlm.prune.schedule import GradualPruning
from memlm.prune.structured import Removal, remove_

__all__ = ["GradualPruning", "Removal", "remove_"]
