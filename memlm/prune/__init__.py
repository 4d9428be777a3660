"""Pruning: smaller models, and models with zeros."""

from memlm.prune.structured import Removal, remove_

__all__ = ["Removal", "remove_"]
