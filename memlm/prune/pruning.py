"""``prune_``: zeros into the linear layers of a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from memlm import formats, sparse_formats
from memlm.convert import _check_model, _heads, _obstacle, _places, _put, _tell_parents
from memlm.layers import Linear, PackedModule, SparseLinear
from memlm.layers.linear import is_conv1d, linear_weight
from memlm.models.decoder import Decoder
from memlm.models.encoder import Encoder
from memlm.prune.allocation import allocate
from memlm.prune.calibration import Walk, batches_of, in_f32
from memlm.prune.config import PruneConfig
from memlm.prune.families import Family, family_of
from memlm.prune.gram import Gram
from memlm.prune.report import LayerReport, PruneReport
from memlm.prune.scores import magnitude, wanda
from memlm.prune.sparsegpt import Pruned, sparsegpt
from memlm.quantize import sparse_quantize

ROWS = 512  # of a weight, looked at at a time


@torch.no_grad()
def prune_(
    model: nn.Module,
    config: PruneConfig = PruneConfig(),
    calibration=None,
    progress: Callable[[int, int, str], None] | None = None,
) -> PruneReport:
    """Takes weights out of the linear layers of ``model``, in place; output heads and embeddings
    stay.

    calibration: what the model runs on to judge its weights: text (a string; of an encoder several)
        or token ids, see :func:`memlm.prune.calibration.batches_of`.  Wanda and SparseGPT need it,
        and so does the allocation by sensitivity: then the model is a Decoder or an Encoder of
        memlm, or a llama, mistral, qwen2, qwen3 or bert of transformers.  Magnitude without it
        takes any model.
    progress: called with (done, total, name) after each linear layer.

    With a calibration the model's layers are gone through in order, each on what those before it,
    already pruned, make of the calibration: alive are the hidden states between two layers, and of
    one layer the products of its inputs, in f64, and its weights, in f32.  Packed layers are
    dequantised when it is their turn.  Without a ``format`` they become float ones; with one all
    that is pruned becomes a :class:`memlm.layers.SparseLinear`.

    Returns what became of each layer.  Raises TypeError for another kind of model or config,
    ValueError for a pattern that matches no layer, for weights with NaN or Inf, for a model with
    nothing to prune, or no calibration where it is needed; the model is then unchanged.  Where
    inputs turn out to have NaN or Inf, or a pruned layer cannot be stored, the ValueError comes
    when the layers before it are pruned.
    """
    _check_model(model)
    if not isinstance(config, PruneConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a PruneConfig")
    if isinstance(model, (nn.Linear, PackedModule)):
        raise ValueError(f"model: is itself a {type(model).__name__}, expected one with layers")
    measured = config.method != "magnitude" or config.allocation != "uniform"
    family = batches = None
    if measured or calibration is not None:
        if calibration is None:
            raise ValueError(f"calibration: none given; {config.method} needs it")
        family = family_of(model)
        batches = batches_of(model, calibration, config.samples, config.length)
    chosen, left = _choose(model, family, config)
    return _Work(model, config, family, batches, chosen, left, progress).run()


def _choose(
    model: nn.Module, family: Family | None, config: PruneConfig
) -> tuple[dict[str, float], dict[str, str]]:
    """Name -> sparsity of the layers to prune, and name -> reason of those to leave alone."""
    modules = dict(model.named_modules())
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, Linear)) or is_conv1d(module)
    }
    config.check_patterns((name, type(module).__name__) for name, module in found.items())
    heads, holders = _heads(modules), defaultdict(list)
    for name, module in modules.items():
        for parameter in module._parameters.values():
            holders[id(parameter)].append(name)
    inside = None
    if family is not None:
        inside = {id(module) for layer in family.layers for module in layer.modules()}
    chosen, left = {}, {}
    for name, module in found.items():
        share = config.sparsity_of(name, type(module).__name__)
        weight = module._parameters.get("weight")
        if share is None:
            left[name] = "config: ignored by a pattern"
        elif name in heads:
            left[name] = "is an output head"
        elif inside is not None and id(module) not in inside:
            left[name] = "is not in one of the model's layers"
        elif not isinstance(module, Linear) and (reason := _obstacle(module, weight, False)):
            left[name] = reason
        elif weight is not None and len(holders[id(weight)]) > 1:
            left[name] = "shares its weight with another module"
        else:
            if weight is not None and not all(map(torch.isfinite, torch.aminmax(weight))):
                raise ValueError(f"{name}: its weight contains NaN or Inf")
            chosen[name] = share
    if not chosen:
        raise ValueError("model: has no linear layer to prune")
    return chosen, left


@dataclass
class _Work:
    """Goes through the chosen layers and prunes them."""

    model: nn.Module
    config: PruneConfig
    family: Family | None
    batches: list | None
    chosen: dict[str, float]
    left: dict[str, str]
    progress: Callable[[int, int, str], None] | None
    reports: list[LayerReport] = field(default_factory=list)
    done: int = 0

    def __post_init__(self):
        modules = {name: self.model.get_submodule(name) for name in self.chosen}
        self.dtypes = {
            name: module.dtype if isinstance(module, Linear) else module.weight.dtype
            for name, module in modules.items()
        }

    def run(self) -> PruneReport:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self.places = _places(self.model)
        try:
            if self.family is None:
                for name in self.chosen:
                    with self._opened([name]) as (linears, packed):
                        self._prune(name, linears[name], None, packed)
            else:
                if self.config.allocation == "sensitivity":
                    self._allocate()
                self._walk()
        finally:
            _tell_parents(self.model)
            for module in training:
                module.training = True
        return PruneReport(self.config.method, tuple(self.reports), self.left)

    def _names(self) -> list[list[str]]:
        """The chosen linear layers inside each layer of the family."""
        names = {id(self.model.get_submodule(name)): name for name in self.chosen}
        layers = self.family.layers
        return [[names[id(m)] for m in layer.modules() if id(m) in names] for layer in layers]

    def _walk(self) -> None:
        walk, names = Walk(self.family, self.batches), self._names()
        for i, layer in enumerate(self.family.layers):
            with self._opened(names[i], layer) as (linears, packed):
                self._prune_all(walk.grams(i, linears), linears, packed)
                if any(names[i + 1 :]):
                    walk.advance(i)

    def _prune_all(self, groups: list[tuple[list[str], Gram]], linears: dict, packed: dict) -> None:
        """Prunes linear layers group by group; each one's products are then let go."""
        while groups:
            shared, gram = groups.pop(0)
            for name in shared:
                self._prune(name, linears[name], gram, packed)

    def _allocate(self) -> None:
        """Replaces the sparsities by those of the allocation."""

        def weights() -> Iterator[tuple[str, torch.Tensor, Gram]]:
            walk, names = Walk(self.family, self.batches), self._names()
            for i, layer in enumerate(self.family.layers):
                with self._opened(names[i], layer, keep=True) as (linears, _):
                    for shared, gram in walk.grams(i, linears, advance=True):
                        for name in shared:
                            yield name, linear_weight(linears[name]).float(), gram

        self.chosen = allocate(weights(), self.chosen, self.config)

    @contextmanager
    def _opened(self, names: list[str], layer: nn.Module | None = None, keep: bool = False):
        """These linear layers as float ones, by name, in f32 inside memlm's ``layer``, and a dict
        to put the packed form of those into that are to be stored so.  Then they are what they
        shall be; with ``keep`` what they were."""
        linears, before, packed = {}, {}, {}
        for name in names:
            module = self.model.get_submodule(name)
            if isinstance(module, Linear):
                before[name] = module
                module = module.to_float(torch.float32)
                self._replace(before[name], module)
            linears[name] = module
        ours = isinstance(self.model, (Decoder, Encoder)) and layer is not None
        try:
            if ours:
                with in_f32(layer):
                    yield linears, packed
            else:
                yield linears, packed
        except BaseException:
            keep = True
            raise
        finally:
            for name, linear in linears.items():
                if name in before and keep:
                    self._replace(linear, before[name])
                    continue
                if name in before:
                    for parameter in linear.parameters():
                        parameter.data = parameter.data.to(before[name].dtype)
                if name in packed:
                    dtype = linear.weight.dtype
                    self._replace(linear, SparseLinear(packed[name], linear.bias, None, dtype))

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        _put(self.places, old, new)
        self.places[id(new)] = self.places.pop(id(old))

    def _prune(self, name: str, linear: nn.Module, gram: Gram | None, packed: dict) -> None:
        weight = linear_weight(linear)
        pruned = self._pruned(weight.float(), self.chosen[name], gram)
        new = pruned.weight.to(weight.dtype)
        if pruned.packed is None:
            new = new.to(self.dtypes[name]).to(weight.dtype)
        self.reports.append(self._report(name, weight, new, pruned, gram))
        linear.weight.data = new.T.contiguous() if is_conv1d(linear) else new
        if pruned.packed is not None:
            packed[name] = pruned.packed
        self.done += 1
        if self.progress:
            self.progress(self.done, len(self.chosen), name)

    def _pruned(self, weight: torch.Tensor, sparsity: float, gram: Gram | None) -> Pruned:
        config, format = self.config, self.config.sparse_format
        where = (sparsity, config.pattern, config.block)
        if config.method == "sparsegpt":
            return sparsegpt(weight, gram.products, *where, config.damping, format)
        if config.method == "wanda":
            zeros = wanda(weight, gram.squares, *where)
        else:
            zeros = magnitude(weight, *where)
        weight = weight.masked_fill(zeros, 0)
        if format is None:
            return Pruned(weight)
        packed = sparse_quantize(weight, format)
        return Pruned(sparse_formats.dequantize(packed), packed)

    def _report(
        self, name: str, old: torch.Tensor, new: torch.Tensor, pruned: Pruned, gram: Gram | None
    ) -> LayerReport:
        n, k = old.shape
        error = None if gram is None else relative_error(old, new, gram.products)
        dense = n * k * self.dtypes[name].itemsize
        if pruned.packed is None:
            values, stored = str(self.dtypes[name]).removeprefix("torch."), dense
            sparsity = 1 - int(torch.count_nonzero(new)) / (n * k)
        else:
            format, stored = pruned.packed.format, pruned.packed.nbytes
            values = format.values if format.is_float else format.values.name
            dense = _dense_bytes(pruned.packed)
            sparsity = 1 - int(sparse_formats.unpack(pruned.packed)[1].sum()) / (n * k)
        return LayerReport(
            name, n, k, self.config.pattern, values, sparsity, error, stored, dense
        )


def _dense_bytes(packed: sparse_formats.SparsePacked) -> int:
    """Of the same type of values, all of them."""
    format, n, k = packed.format, packed.n, packed.k
    if format.is_float:
        return n * k * format.bits // 8
    shapes = formats.layout(format.values, n, k, packed.scales.dtype).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def relative_error(old: torch.Tensor, new: torch.Tensor, products: torch.Tensor) -> float:
    """``||X new^T - X old^T|| / ||X old^T||`` for ``products = X^T X``, f64; 0 of nothing."""
    size = lost = 0.0
    single = products.float()
    for rows, changed in zip(old.float().split(ROWS), new.float().split(ROWS)):
        size += float(((rows @ single) * rows).sum())
        # In f64: a change that hardly shows in the result is a small difference of large numbers.
        change = changed.double() - rows.double()
        lost += float(((change @ products) * change).sum())
    return math.sqrt(max(lost, 0.0) / size) if size > 0 else 0.0
