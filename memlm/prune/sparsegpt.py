"""SparseGPT (arXiv:2301.00774): weights leave column by column, and those of later columns take
over what the layer's result loses; rounding of what stays is made up for in the same way.

With ``H = X^T X + damping`` of the layer's inputs and the upper triangular U of ``H^-1 = U^T U``,
changing a row's weight in column j by ``-e U_jj`` is best answered by changing those in columns
l > j by ``-e U_jl``, and costs ``e^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memlm import _rounding, formats, ops, sparse_formats
from memlm._format import LANE_K, Format, SparseFormat
from memlm.prune.patterns import block_sums, lowest
from memlm.sparse_formats import FLOAT_DTYPES, SparsePacked

COLUMNS = 32  # updated one by one; the columns behind them once for all of these
LARGER_DAMPING = (1, 10, 100)  # times the wanted one, until the Cholesky factor exists


@dataclass(frozen=True)
class Pruned:
    """``weight [n, k]`` f32 with its zeros, and, where a format was given, ``packed``: the same
    numbers as they are stored."""

    weight: torch.Tensor
    packed: SparsePacked | None = None


def sparsegpt(
    weight: torch.Tensor,
    products: torch.Tensor,
    sparsity: float,
    pattern: str,
    block: tuple[int, int],
    damping: float = 0.01,
    format: SparseFormat | None = None,
) -> Pruned:
    """Prunes ``weight [n, k]``, f32, for inputs whose ``X^T X`` is ``products [k, k]``, f64.

    Zeros are chosen when their columns are reached, by what their loss costs then: 32 columns of
    weights at a time by ``(w_ij / U_jj)^2``, or a column of blocks, by ``||w_i U_bb^-1||^2`` summed
    over a block's rows.  How many go of each is decided at the beginning, by what all would cost
    then: the paper takes the same share of each 128 columns, which loses more (docs/pruning.md).
    Those of 2:4 are chosen 4 columns at a time; with a format, whose scales have to be known, a
    group.

    With a ``format`` the weights that stay are rounded to its values as their column is passed; a
    group's scales are found when its first column is reached, from the weights as they are then.

    ``damping`` times the mean of the products' diagonal is added to it; ten and a hundred times
    as much where there is no Cholesky factor otherwise.  Raises ValueError where that does not
    help.
    """
    factor = inverse_factor(products, damping)
    n, k = weight.shape
    u = factor.to(weight.dtype)
    w = weight.T.contiguous()  # [k, n]: a column of the matrix is a row here
    pruned = torch.zeros(k, n, dtype=torch.bool)
    rounding = None if format is None else _Rounding(format, w)
    chooser = _Chooser(w, u, sparsity, pattern, block, 0 if rounding is None else rounding.group)
    errors = torch.empty(COLUMNS, n)
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        for j in range(start, end):
            if j % chooser.step == 0:
                chooser.choose(j, w, pruned)
            if rounding is not None and rounding.begins(j):
                rounding.begin(j, w, pruned)
            new = w[j].masked_fill(pruned[j], 0)
            if rounding is not None:
                new = rounding.round(j, new, pruned[j])
            error = torch.sub(w[j], new, out=errors[j - start]).div_(u[j, j])
            w[j] = new
            w[j + 1 : end].addr_(u[j, j + 1 : end], error, alpha=-1)
        w[end:].addmm_(u[start:end, end:].T, errors[: end - start], alpha=-1)
    if rounding is None:
        return Pruned(w.T.contiguous())
    packed = rounding.pack(~pruned.T)
    return Pruned(sparse_formats.dequantize(packed), packed)


def inverse_factor(products: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper triangular U, f64, of ``(products + damping)^-1 = U^T U``."""
    mean = float(products.diagonal().mean())
    for times in LARGER_DAMPING:
        damped = products.flip(0, 1)
        damped.diagonal().add_(damping * times * mean if mean > 0 else 1.0)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            # H, turned around, is L L^T; so U is L^-1, turned around.
            ones = torch.eye(len(lower), dtype=lower.dtype)
            return torch.linalg.solve_triangular(lower, ones, upper=False).flip(0, 1)
    raise ValueError(
        f"damping: {damping * LARGER_DAMPING[-1]} of the diagonal's mean is not enough for a "
        "Cholesky factor of the inputs' products"
    )


def block_costs(w: torch.Tensor, u: torch.Tensor, rows: int) -> torch.Tensor:
    """What losing all of a block costs when only the columns behind it make up for it, for each of
    its weights: ``w [C, n]`` are a column of blocks, ``u [C, C]`` its part of U; ``[n / rows]``."""
    errors = torch.linalg.solve_triangular(u.T, w, upper=False)
    squares = errors.square().sum(0)[:, None]
    costs, counts = (block_sums(x, (rows, 1))[:, 0] for x in (squares, torch.ones_like(squares)))
    return costs / (counts * len(w))


class _Chooser:
    """Chooses what is lost of ``step`` columns of ``w [k, n]`` at a time."""

    def __init__(self, w, u, sparsity: float, pattern: str, block: tuple[int, int], group: int):
        self.u, self.pattern, self.block, self.k = u, pattern, block, len(w)
        if pattern == "2:4":
            self.step = group or LANE_K
            return
        self.step = block[1] if pattern == "block" else COLUMNS
        costs = [self._costs(start, w) for start in range(0, self.k, self.step)]
        sizes = [cost.numel() for cost in costs]
        together = torch.cat([cost.flatten() for cost in costs])
        chosen = lowest(together, round(sparsity * len(together)))
        self.counts = [int(part.sum()) for part in chosen.split(sizes)]

    def _costs(self, start: int, w: torch.Tensor) -> torch.Tensor:
        """Of losing each weight, ``[columns, n]``, or block, ``[n / R]``."""
        part = slice(start, start + self.step)
        if self.pattern == "block":
            return block_costs(w[part], self.u[part, part], self.block[0])
        return (w[part] / self.u.diagonal()[part, None]).square_()

    def choose(self, start: int, w: torch.Tensor, pruned: torch.Tensor) -> None:
        """Sets what is lost of the columns from ``start`` on in ``pruned [k, n]``."""
        costs, part = self._costs(start, w), pruned[start : start + self.step]
        if self.pattern == "2:4":
            _lose_two_of_four(costs, part)
            return
        chosen = lowest(costs, self.counts[start // self.step])
        if self.pattern == "block":
            chosen = chosen.repeat_interleave(self.block[0])[: part.shape[1]]
        part.copy_(chosen)


def _lose_two_of_four(costs: torch.Tensor, pruned: torch.Tensor) -> None:
    """Of each four of the columns; of three left over one, so that two stay."""
    whole, n = len(costs) // LANE_K * LANE_K, costs.shape[1]
    fours = (whole // LANE_K, LANE_K, n)
    two = costs[:whole].view(fours).topk(2, dim=1, largest=False, sorted=False).indices
    pruned[:whole].view(fours).scatter_(1, two, True)
    if len(costs) > whole + 2:
        pruned[whole:].scatter_(0, costs[whole:].argmin(0, keepdim=True), True)


class _Rounding:
    """Rounds columns of ``w [k, n]`` to a format's values, one after the other."""

    def __init__(self, format: SparseFormat, w: torch.Tensor):
        self.format, (self.k, n) = format, w.shape
        self.group = COLUMNS
        if format.is_float:
            self.q = torch.zeros(self.k, n, dtype=FLOAT_DTYPES[format.values])
            return
        values: Format = format.values
        self.group = values.group
        self.scale_dtype = _rounding.scale_dtype(torch, values, float(w.abs().max()))
        self.q = torch.zeros(self.k, n, dtype=torch.int8 if values.bits == 8 else torch.uint8)
        self.scales: list[torch.Tensor] = []
        self.offsets: list[torch.Tensor] = []
        levels = tuple(range(-127, 128)) if values.bits == 8 else values.levels[: len(values.codes)]
        self.nearest = _rounding.rounder(torch, w, levels)

    def begins(self, j: int) -> bool:
        return not self.format.is_float and j % self.group == 0

    def begin(self, j: int, w: torch.Tensor, pruned: torch.Tensor) -> None:
        """Finds the scales of the group that begins with column j."""
        columns = slice(j, j + self.group)
        group = w[columns].masked_fill(pruned[columns], 0).T.contiguous()
        packed = ops.quantize_weight(group, self.format.values, self.scale_dtype)
        _, scales, offsets = formats.unpack(packed)
        self.scales.append(scales)
        if offsets is not None:
            self.offsets.append(offsets)

    def round(self, j: int, column: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
        """The values ``[n]`` that column j becomes; what is pruned is 0."""
        if self.format.is_float:
            self.q[j] = column
            return self.q[j].float()
        scale = self.scales[-1][:, 0].float()
        offset = self.offsets[-1][:, 0].float() if self.offsets else 0.0
        levels, codes = self.nearest(_rounding.positions(torch, column, scale, offset))
        self.q[j] = codes.to(self.q.dtype)
        return (levels * scale + offset).masked_fill_(pruned, 0)

    def pack(self, keep: torch.Tensor) -> SparsePacked:
        q = self.q.T.contiguous()
        if self.format.is_float:
            return sparse_formats.pack(q, keep, None, None, self.format)
        scales = torch.cat(self.scales, dim=1)
        offsets = torch.cat(self.offsets, dim=1) if self.offsets else None
        return sparse_formats.pack(q, keep, scales, offsets, self.format)
