"""Pruning: smaller models, and models with zeros."""

from memlm.prune.recover import recover_
from memlm.prune.schedule import GradualPruning
from memlm.prune.structured import Removal, remove_

__all__ = ["GradualPruning", "Removal", "recover_", "remove_"]
