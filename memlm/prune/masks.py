"""Weights that stay zero while a model is trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn


class Masks:
    """Holds chosen elements of weights at zero through the steps of an optimizer.

    A gradient is masked as soon as it has been accumulated, so that it counts nowhere: in the norm
    that gradients are clipped by, in an optimizer's averages.  After each step the weights are:
    whatever the optimizer did, they are exactly zero.  Where a mask is set, the optimizer's state
    is zero, too.

    ``pruned``: name -> bool tensor of the weight's shape, True where it is held at zero.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]):
        """Nothing is held yet.  Raises ValueError naming a weight that the optimizer has not."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, weight in weights.items():
            if id(weight) not in trained:
                raise ValueError(f"optimizer: does not train {name}")
        self.weights = dict(weights)
        self.pruned = {
            name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()
        }
        self._optimizer = optimizer
        self._hooks = [optimizer.register_step_post_hook(self._after_step)]
        for name, weight in self.weights.items():
            hook = functools.partial(_mask_gradient, self.pruned[name])
            self._hooks.append(weight.register_post_accumulate_grad_hook(hook))

    @torch.no_grad()
    def hold(self, name: str, pruned: torch.Tensor) -> None:
        """From now on these elements are zero, and no others."""
        weight, mask = self.weights[name], self.pruned[name]
        mask.copy_(pruned)
        state = self._optimizer.state.get(weight, {}).values()
        for tensor in (weight, weight.grad, *state):
            if isinstance(tensor, torch.Tensor) and tensor.shape == mask.shape:
                tensor.masked_fill_(mask, 0)

    def remove(self) -> None:
        """Lets go of the weights, which stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _after_step(self, *_) -> None:
        for name, weight in self.weights.items():
            weight.masked_fill_(self.pruned[name], 0)


def _mask_gradient(pruned: torch.Tensor, weight: nn.Parameter) -> None:
    weight.grad.masked_fill_(pruned, 0)
