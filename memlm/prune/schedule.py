"""Gradual pruning by magnitude while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from memlm.convert import _heads
from memlm.prune.masks import Masks
from memlm.prune.patterns import BLOCK, PATTERNS, smallest


class GradualPruning:
    """Sets more and more of the smallest weights to zero while ``optimizer`` trains ``model``.

    After t of its steps the share of zeros in each layer is

        s_t = sparsity + (initial - sparsity) (1 - (t - begin) / (end - begin))^3

    from ``begin`` to ``end`` (Zhu and Gupta, arXiv:1710.01878): fast at first, while there are
    redundant weights, then slower and slower.  Every ``every`` steps, and at the end, each
    layer's smallest weights are added to its mask, by their magnitudes at that moment; what is
    masked once stays so.  Between and after that the masks hold (:class:`Masks`), until
    :meth:`remove`.

        optimizer = torch.optim.AdamW(model.parameters())
        pruning = GradualPruning(model, optimizer, 0.5, end=1000)
        ...                            # train as before: it counts the optimizer's steps itself

    sparsity, initial: shares of zeros, 0 to 1; of ``"2:4"`` 0 to 0.5.
    pattern: ``"unstructured"``; ``"2:4"``: of four consecutive columns the two smallest only;
        ``"block"``: whole ``block``s of rows and columns by their norm (16 x 32 are what memlm
        stores; a share is one of blocks).
    filter_fn: ``filter_fn(module, name) -> bool``: which ``torch.nn.Linear`` to prune; None: all
        but output heads.

    Forward and backward may be compiled (``torch.compile``); ``optimizer.step`` itself must not be.
    Masks of a tied weight hold once for all its layers.

    Raises TypeError for an argument of another kind, ValueError for one out of range, for a model
    of which nothing is left to prune, and for an optimizer that does not train a weight.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        *,
        end: int,
        begin: int = 0,
        every: int = 10,
        initial: float = 0.0,
        pattern: str = "unstructured",
        block: tuple[int, int] = BLOCK,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
    ):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern: got {pattern!r}, accepted are {', '.join(PATTERNS)}")
        most = 0.5 if pattern == "2:4" else 1.0
        for name, share in (("sparsity", sparsity), ("initial", initial)):
            if not isinstance(share, (int, float)) or not 0 <= share <= most:
                raise ValueError(f"{name}: got {share!r}, accepted is 0 to {most}")
        if initial > sparsity:
            raise ValueError(f"initial: got {initial}, accepted is up to sparsity, {sparsity}")
        for name, value, least in (
            ("begin", begin, 0),
            ("end", end, begin + 1),
            ("every", every, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, accepted are integers from {least} on")
        if len(block) != 2 or min(block) < 1:
            raise ValueError(f"block: got {block!r}, accepted are (rows, columns)")
        self.sparsity, self.initial, self.pattern, self.block = sparsity, initial, pattern, block
        self.begin, self.end, self.every, self.step = begin, end, every, 0
        self.masks = Masks(optimizer, _weights(model, filter_fn))
        self._hook = optimizer.register_step_post_hook(self._after_step)
        self._update()

    def share(self, step: int) -> float:
        """The share of zeros after so many steps."""
        if step < self.begin:
            return 0.0
        left = 1 - min(1.0, (step - self.begin) / (self.end - self.begin))
        return self.sparsity + (self.initial - self.sparsity) * left**3

    def state_dict(self) -> dict:
        """What :meth:`load_state_dict` needs to go on: the steps so far, and the masks."""
        return {"step": self.step, "pruned": {n: m.clone() for n, m in self.masks.pruned.items()}}

    def load_state_dict(self, state: Mapping) -> None:
        """Goes on where the other was.  To be called after the optimizer has its state.

        Raises ValueError for masks that are not this model's; nothing has changed then.
        """
        given = {name: tuple(mask.shape) for name, mask in state["pruned"].items()}
        own = {name: tuple(mask.shape) for name, mask in self.masks.pruned.items()}
        if given != own:
            name = next(n for n in [*given, *own] if given.get(n) != own.get(n))
            raise ValueError(
                f"state: {name}: got a mask of shape {given.get(name)}, expected {own.get(name)}"
            )
        self.step = state["step"]
        for name, pruned in state["pruned"].items():
            self.masks.hold(name, pruned)

    def remove(self) -> None:
        """Lets go of the model and the optimizer.  The zeros stay, as ordinary weights."""
        self._hook.remove()
        self.masks.remove()

    def _after_step(self, *_) -> None:
        self.step += 1
        self._update()

    def _update(self) -> None:
        """Prunes, where it is time to."""
        since = self.step - self.begin
        if since < 0 or self.step > self.end or (since % self.every and self.step != self.end):
            return
        for name, weight in self.masks.weights.items():
            pruned = self.masks.pruned[name]
            # What is masked already is smallest of all.
            scores = weight.detach().float().abs().masked_fill(pruned, -1)
            pruned = smallest(scores, self.share(self.step), self.pattern, self.block)
            self.masks.hold(name, pruned)


def _weights(model: nn.Module, filter_fn) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    modules = dict(model.named_modules())
    heads, weights, seen = _heads(modules), {}, set()
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or module._parameters.get("weight") is None:
            continue
        chosen = name not in heads if filter_fn is None else filter_fn(module, name)
        if chosen and id(module.weight) not in seen:
            seen.add(id(module.weight))
            weights[f"{name}.weight".lstrip(".")] = module.weight
    if not weights:
        raise ValueError("model: has no torch.nn.Linear to prune, or none was chosen")
    return weights
