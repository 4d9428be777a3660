"""Structured removal: heads, MLP channels and whole layers, which leaves a smaller dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memlm.convert import _obstacle
from memlm.prune.calibration import batches_of
from memlm.prune.families import Family, Run, Site, family_of, input_of
from memlm.prune.gram import Gram

# Groups leave a layer in so many rounds; after each, what is left takes over from them and is
# judged anew.
ROUNDS = 16
SAMPLES, LENGTH = 128, 512  # pieces of a text, and the tokens of each
LEAST = 1e-5  # of the squares of what columns are given, added to the Gram matrix's diagonal
CHANNELS = 32  # a share of channels is rounded so that a multiple of so many stays: formats' groups


@dataclass(frozen=True)
class Part:
    """What became of one layer's heads or channels: the numbers ``kept`` of ``of``, and the
    ``error`` of the layer that reads them, on what it was given from the calibration: the norm of
    its change over the norm of what it returned before."""

    name: str
    kept: tuple[int, ...]
    of: int
    error: float


@dataclass(frozen=True)
class Removal:
    """What :func:`remove_` did.

    layers: numbers of the layers that were taken out; ``influence``: of every layer, where it was
        measured, the mean of 1 - cos between what enters and what leaves it.
    parts: the others' heads and channels, named as they are now.
    parameters: how many there are now, and ``before``.
    """

    layers: tuple[int, ...]
    influence: tuple[float, ...]
    parts: tuple[Part, ...]
    parameters: int
    before: int

    def __str__(self) -> str:
        lines = [
            f"{part.name}: {len(part.kept)} of {part.of} kept, error {part.error:.3f}"
            for part in self.parts
        ]
        if self.layers:
            lines.insert(0, f"without layers {', '.join(map(str, self.layers))}")
        share = self.parameters / self.before
        lines.append(f"{self.parameters:,} of {self.before:,} parameters, {share:.1%}")
        return "\n".join(lines)


@torch.no_grad()
def remove_(
    model: nn.Module,
    calibration=None,
    *,
    heads: int | float = 0,
    channels: int | float = 0,
    layers: int | Sequence[int] = 0,
    compensate: bool = True,
    damp: float = 0.5,
    progress: Callable[[int, int, str], None] | None = None,
) -> Removal:
    """Takes the least important heads, MLP channels and layers out of ``model``, in place.  What is
    left is an ordinary smaller model: it is saved, loaded, quantised, exported and trained as any
    other.

    model: memlm's Decoder or Encoder, or a llama, mistral, qwen2, qwen3 or bert of transformers
        (of whose bert heads cannot be taken).  The layers that are cut must be float ones; whole
        layers may be packed.
    calibration: text, or what the model runs on, as :func:`memlm.prune.calibration.batches_of`
        takes it, of text 128 pieces of 512 tokens; not needed where nothing but ``layers`` by
        number is asked for.
    heads: how many of each layer, or as a float below 1 which share; with grouped queries
        key-value heads, each with the query heads that read it.
    channels: likewise of each MLP; of a share, rounded so that a multiple of 32 stays.
    layers: how many, or which.
    compensate: what is left of a layer takes over from what leaves it.
    damp: for the update correlations between what columns are given are taken to be
        1 / (1 + damp) of what they are in the calibration.  With less the update fits its text
        better and others worse: of 12,288 tokens of speeches, 0.3 to 1 were best for a novel, 0.01
        no better than no update.
    progress: called with (done, total, name) after each step of the work on a layer.

    Layers are judged by block influence, ``1 - cos`` between what enters and what leaves them, mean
    over tokens (ShortGPT, arXiv:2403.03853).  The others are gone through in order, each on what
    the ones before it, already cut, make of the calibration; alive are one layer's Gram matrix,
    in f64, and the hidden states of all batches.

    A group's columns W_g of the layer that reads it are judged by what the layer's result loses on
    the calibration.  With ``compensate`` that is what is left to lose after a least-squares update
    of the other columns, ``tr(W_g (H^-1_gg)^-1 W_g^T)`` (optimal brain surgeon, of groups of
    columns: ZipLM, arXiv:2302.04089; H: the Gram matrix of what the layer is given), and the
    update is made.  Groups leave in 16 rounds.  Without it, it is ``tr(W_g H_gg W_g^T)``: for a
    channel ``||a|| ||W_g||``, squared.  Layers that have a bias absorb the mean of what leaves
    them (FLAP, arXiv:2312.11983).

    Raises TypeError for another kind of model, or a layer that cannot be cut; ValueError for
    numbers out of range, or no calibration where it is needed; the model is then unchanged.
    """
    family = family_of(model)
    heads = _count("heads", heads, family.heads)
    channels = _count("channels", channels, family.channels, CHANNELS)
    family.check(heads)
    chosen, count = None, 0
    if isinstance(layers, (int, float)):
        count = _count("layers", layers, len(family.layers))
    else:
        chosen = _numbers(layers, len(family.layers))
    if isinstance(damp, bool) or not isinstance(damp, (int, float)) or not 0 < damp < math.inf:
        raise ValueError(f"damp: got {damp!r}, accepted is a positive number")
    if (heads or channels or count) and calibration is None:
        raise ValueError("calibration: none given; heads, channels and a number of layers need it")
    batches = [] if calibration is None else batches_of(model, calibration, SAMPLES, LENGTH)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in family.layers:
        _check_layer(family, layer, heads, channels, names)

    before, training = _parameters(model), [m for m in model.modules() if m.training]
    model.eval()
    try:
        runs = [Run(family, batch) for batch in batches]
        influence, parts = (), ()
        if count:
            influence = _influence(runs)
            chosen = sorted(sorted(range(len(influence)), key=influence.__getitem__)[:count])
        removed = tuple(chosen or ())
        kept = [i for i in range(len(family.layers)) if i not in removed]
        for i in reversed(removed):
            del family.layers[i]
        for run in runs:
            run.calls = [run.calls[i] for i in kept]
        if heads or channels:
            parts = tuple(_Work(family, runs, heads, channels, compensate, damp, progress).run())
        family.resize_(kept, family.heads - heads, family.channels - channels)
    finally:
        for module in training:
            module.training = True
    return Removal(removed, tuple(influence), parts, _parameters(model), before)


def _parameters(model: nn.Module) -> int:
    """Weights and biases; a weight that several layers share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _count(name: str, value: int | float, total: int, multiple: int = 1) -> int:
    """How many of ``total`` leave.  Raises ValueError."""
    if isinstance(value, float) and 0 <= value < 1:
        kept = math.ceil(round((1 - value) * total / multiple, 6)) * multiple
        return total - min(kept, total)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < total:
        raise ValueError(
            f"{name}: got {value!r}, accepted are 0 to {total - 1} or a share below 1: some stay"
        )
    return value


def _numbers(layers: Sequence[int], total: int) -> list[int]:
    """The layers' numbers, ascending.  Raises ValueError."""
    numbers = sorted(layers)
    right = all(isinstance(i, int) and 0 <= i < total for i in numbers)
    if not right or len(set(numbers)) != len(numbers) or len(numbers) == total:
        raise ValueError(
            f"layers: got {list(layers)!r}, accepted are different numbers from 0 to {total - 1}, "
            "not all"
        )
    return numbers


def _check_layer(family: Family, layer: nn.Module, heads: int, channels: int, names: dict) -> None:
    """Raises TypeError where a linear layer that is to be cut is not just that."""
    for wanted, find in ((heads, family.attention), (channels, family.mlp)):
        if not wanted:
            continue
        site = find(layer)
        for linear in (site.out, *(source for source, _ in site.sources)):
            if isinstance(linear, nn.Linear):
                obstacle = _obstacle(linear, linear._parameters.get("weight"), False)
            else:
                obstacle = f"is a {type(linear).__name__}, not a torch.nn.Linear"
            if obstacle:
                raise TypeError(f"model: {names[id(linear)]}: {obstacle}; it cannot be cut")


def _influence(runs: list[Run]) -> list[float]:
    """Of each layer the mean over tokens of 1 - cos between what enters and what leaves it."""
    sums, tokens = torch.zeros(len(runs[0].calls), dtype=torch.float64), 0
    for run in runs:
        x = run.states
        tokens += len(run.tokens(x))
        for i, call in enumerate(run.calls):
            y = call(x)
            cosine = F.cosine_similarity(run.tokens(x), run.tokens(y), dim=-1)
            sums[i] += (1 - cosine).sum(dtype=torch.float64)
            x = y
    return (sums / tokens).tolist()


@dataclass
class _Work:
    """Goes through the layers of a family and cuts them."""

    family: Family
    runs: list[Run]
    heads: int
    channels: int
    compensate: bool
    damp: float
    progress: Callable[[int, int, str], None] | None

    def run(self) -> list[Part]:
        family, parts = self.family, []
        names = {id(module): name for name, module in family.model.named_modules()}
        total = len(family.layers) * (bool(self.heads) + bool(self.channels))

        def cut(i: int, site: Site, count: int) -> None:
            gram = Gram(site.out.in_features)
            for run in self.runs:
                given = input_of(site.out, lambda: run.calls[i](run.states))
                gram.add(run.tokens(given))
            kept, error = self._cut(site, gram, count)
            name = names[id(site.out)]
            parts.append(Part(name, tuple(kept.tolist()), site.groups, error))
            if self.progress:
                self.progress(len(parts), total, name)

        for i, layer in enumerate(family.layers):
            if self.heads:
                cut(i, family.attention(layer), self.heads)
                family.set_heads(layer, family.heads - self.heads)
            if self.channels:
                cut(i, family.mlp(layer), self.channels)
            for run in self.runs:
                run.states = run.calls[i](run.states)
        return parts

    def _cut(self, site: Site, gram: Gram, count: int) -> tuple[torch.Tensor, float]:
        """Takes ``count`` groups out; returns those that stay, and the error."""
        out, matrix = site.out, gram.of(site.out)
        weight = out.weight.double()
        damped = matrix.clone()
        sizes = gram.squares
        # Without the last, what is constant, but for rounding, would make the matrix singular.
        damped.diagonal().mul_(1 + self.damp).add_(LEAST * (sizes + sizes.mean() + 1e-30))
        choose = _with_update if self.compensate else _without_update
        kept, new = choose(weight, damped, site.groups, count)
        columns = site.columns(kept)
        bias = out.bias
        if bias is not None:
            mean = gram.sums / gram.tokens
            bias = bias.double() + weight @ mean - new @ mean[columns]
        change = weight.clone()
        change[:, columns] -= new
        size = float(((weight @ matrix) * weight).sum())
        lost = float(((change @ matrix) * change).sum())
        site.keep_(kept, new, bias)
        return kept, math.sqrt(max(lost, 0.0) / size) if size > 0 else 0.0


def _without_update(weight, gram, groups: int, count: int):
    """The numbers, ascending, of the groups whose part in the layer's result is largest, all but
    ``count``, and their columns of ``weight [n, k]``; ``gram [k, k]``, all f64."""
    parts = weight.view(len(weight), groups, -1)
    importance = torch.einsum("ngi,gij,ngj->g", parts, _blocks(gram, groups), parts)
    kept = importance.topk(groups - count).indices.sort().values
    return kept, parts[:, kept].flatten(1)


def _with_update(weight, gram, groups: int, count: int):
    """As :func:`_without_update`, by what is lost in spite of the others' update, and with it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    size, kept = weight.shape[1] // groups, torch.arange(groups)
    for left in range(ROUNDS, 0, -1):
        dropped = count - (groups - len(kept))  # still to be
        now = -(-dropped // left)
        if not now:
            continue
        parts = weight.view(len(weight), len(kept), size)
        blocks = torch.linalg.inv(_blocks(inverse, len(kept)))
        importance = torch.einsum("ngi,gij,ngj->g", parts, blocks, parts)
        leave = torch.zeros(len(kept), dtype=torch.bool)
        leave[importance.topk(now, largest=False).indices] = True
        gone, rest = (mask.repeat_interleave(size).nonzero()[:, 0] for mask in (leave, ~leave))
        take_over = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, rest])
        weight = weight[:, rest] - weight[:, gone] @ take_over
        inverse = inverse[rest][:, rest] - inverse[rest][:, gone] @ take_over
        kept = kept[~leave]
    return kept, weight


def _blocks(matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """The blocks on the diagonal of ``[k, k]``, ``[groups, k / groups, k / groups]``."""
    size = len(matrix) // groups
    return matrix.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
