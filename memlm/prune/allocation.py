"""How much each layer can spare, when all together shall have one sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from memlm.prune.config import PruneConfig
from memlm.prune.gram import Gram
from memlm.prune.scores import wanda

REACH, STEPS = 0.2, 4  # how far from the wanted sparsity layers may go, in so many steps each way


def allocate(
    layers: Iterable[tuple[str, torch.Tensor, Gram]],
    chosen: Mapping[str, float],
    config: PruneConfig,
) -> dict[str, float]:
    """Name -> sparsity of the chosen layers: those that have the config's share zeros among all
    their weights, and the least sum of squared relative errors; those that a target gives another
    one keep it.

    layers: each layer's name, its weight ``[n, k]`` and its inputs' products.  What zeros cost a
    layer is measured with Wanda's (arXiv:2306.11695) at some sparsities around the wanted one: the
    squared norm of the change of its result, over that of its result.
    """
    wanted = config.sparsity
    if not 0 < wanted < 1:
        return dict(chosen)
    levels = _levels(wanted)
    costs, sizes = {}, {}
    for name, weight, gram in layers:
        if chosen[name] == wanted:
            costs[name] = _convex(_costs(weight, gram, levels, config), levels)
            sizes[name] = weight.numel()
    return {**chosen, **_spread(costs, sizes, levels, wanted)}


def _levels(wanted: float) -> list[float]:
    low, high = max(0.0, wanted - REACH), min(1.0, wanted + REACH)
    below = [low + (wanted - low) * i / STEPS for i in range(STEPS)]
    return [*below, *(wanted + (high - wanted) * i / STEPS for i in range(STEPS + 1))]


def _costs(
    weight: torch.Tensor, gram: Gram, levels: list[float], config: PruneConfig
) -> list[float]:
    """The squared relative error at each level."""
    products = gram.products.float()
    size = float(((weight @ products) * weight).sum())
    costs = []
    for level in levels:
        zeros = wanda(weight, gram.squares, level, config.pattern, config.block)
        lost = weight.masked_fill(~zeros, 0)
        costs.append(float(((lost @ products) * lost).sum()) / size if size > 0 else 0.0)
    return costs


def _convex(costs: list[float], levels: list[float]) -> list[float]:
    """The largest convex function of the levels that is nowhere above ``costs``: so that the next
    step is never cheaper than the last."""
    convex = list(costs)
    for i in range(len(costs)):
        for left in range(i):
            for right in range(i + 1, len(costs)):
                share = (levels[i] - levels[left]) / (levels[right] - levels[left])
                between = costs[left] + share * (costs[right] - costs[left])
                convex[i] = min(convex[i], between)
    return convex


def _spread(
    costs: Mapping[str, list[float]], sizes: Mapping[str, int], levels: list[float], wanted: float
) -> dict[str, float]:
    """Every layer begins at the lowest level; the steps that cost least for each weight are taken
    until enough weights are gone, the last one in part."""
    steps = []
    for name, cost in costs.items():
        for i in range(len(levels) - 1):
            weights = sizes[name] * (levels[i + 1] - levels[i])
            steps.append(((cost[i + 1] - cost[i]) / weights, i, name, weights))
    left = sum(sizes.values()) * (wanted - levels[0])
    shares = dict.fromkeys(costs, levels[0])
    for _, _, name, weights in sorted(steps):
        # Added up: of steps that cost the same a layer's later one may come first.
        taken = max(0.0, min(weights, left))
        shares[name] += taken / sizes[name]
        left -= taken
    return shares
