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
from memlm.prune.patterns import block_sums, lowest, lowest_blocks
from memlm.sparse_formats import FLOAT_DTYPES, SparsePacked

COLUMNS = 32  # updated one by one; the columns behind them once for all of these
MASKED = 128  # columns among which unstructured zeros are chosen together, as in the paper
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

    Unstructured zeros are chosen among 128 columns at a time, 2:4 ones among 4 (with a format:
    among those of a group, whose scales have to be known), by what their loss costs then,
    ``(w_ij / U_jj)^2``.  Blocks are chosen at the beginning, by what it costs to lose all of one,
    ``sum_i w_i (H^-1_bb)^-1 w_i^T`` over its rows.

    With a ``format`` the weights that stay are rounded to its values as their column is passed; a
    group's scales are found when its first column is reached, from the weights as they are then.

    ``damping`` times the mean of the products' diagonal is added to it; ten and a hundred times
    as much where there is no Cholesky factor otherwise.  Raises ValueError where that does not
    help.
    """
    factor = inverse_factor(products, damping)
    n, k = weight.shape
    if pattern == "block":
        costs = block_costs(weight, factor, block)
        pruned = lowest_blocks(costs, sparsity, (n, k), block).T.contiguous()
    else:
        pruned = torch.zeros(k, n, dtype=torch.bool)
    u = factor.to(weight.dtype)
    w = weight.T.contiguous()  # [k, n]: a column of the matrix is a row here
    rounding = None if format is None else _Rounding(format, w)
    chosen_at = _chosen_at(pattern, k, rounding)
    errors = torch.empty(COLUMNS, n)
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        for j in range(start, end):
            if j in chosen_at:
                columns = slice(j, chosen_at[j])
                costs = (w[columns] / u.diagonal()[columns, None]).square_()
                pruned[columns] = _choose(costs, sparsity, pattern, j, k)
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


def block_costs(
    weight: torch.Tensor, factor: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """What the squared error of the layer's result is at least when all weights of a block are
    lost and all others make up for it: ``sum_i w_i (H^-1_bb)^-1 w_i^T`` over its rows,
    ``[n / R, k / C]``."""
    costs = []
    for start in range(0, weight.shape[1], block[1]):
        columns = slice(start, start + block[1])
        part = factor[:, columns]
        lower = torch.linalg.cholesky(part.T @ part).to(weight.dtype)
        parts = torch.linalg.solve_triangular(lower, weight[:, columns].T, upper=False)
        costs.append(block_sums(parts.square().sum(0)[:, None], (block[0], 1)))
    return torch.cat(costs, dim=1)


def _chosen_at(pattern: str, k: int, rounding: _Rounding | None) -> dict[int, int]:
    """First column -> the one after the last of those among which zeros are chosen together."""
    if pattern == "block":
        return {}
    step = MASKED
    if pattern == "2:4":
        step = LANE_K if rounding is None else rounding.group
    return {start: min(start + step, k) for start in range(0, k, step)}


def _choose(
    costs: torch.Tensor, sparsity: float, pattern: str, start: int, k: int
) -> torch.Tensor:
    """Which of ``costs [columns, n]`` are lost."""
    columns, n = costs.shape
    if pattern == "unstructured":
        # The numbers of all columns add up to the wanted one.
        end = round(sparsity * n * (start + columns))
        return lowest(costs, end - round(sparsity * n * start))
    whole = columns // LANE_K * LANE_K
    chosen = torch.zeros_like(costs, dtype=torch.bool)
    fours = costs[:whole].view(-1, LANE_K, n)
    two = fours.topk(2, dim=1, largest=False, sorted=False).indices
    chosen[:whole].view(-1, LANE_K, n).scatter_(1, two, True)
    if columns > whole + 2:  # of three left over one goes: two may stay
        last = costs[whole:].argmin(0, keepdim=True)
        chosen[whole:].scatter_(0, last, True)
    return chosen


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
