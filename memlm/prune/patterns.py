"""Where zeros may stand: which of a matrix's weights go, by their scores.

``unstructured``: anywhere.  ``2:4``: all but two of each four consecutive columns of a row, and of
those left over behind the last four.  ``block``: whole blocks of rows and columns; incomplete ones
stand below and on the right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memlm._format import ACT_GROUP, LANE_K, PATTERNS, TILE_ROWS

__all__ = ["BLOCK", "PATTERNS", "block_sums", "lowest", "lowest_blocks", "smallest"]

BLOCK = (TILE_ROWS, ACT_GROUP)  # what memlm.sparse_formats stores or leaves out


def smallest(
    scores: torch.Tensor,
    share: float,
    pattern: str,
    block: tuple[int, int] = BLOCK,
    each_row: bool = False,
) -> torch.Tensor:
    """Which of ``scores [n, k]`` are the smallest ``share``, bool ``[n, k]``: of all, or, with
    ``each_row``, of every row; of ``2:4`` of the two smallest of each four (a share of all, too: up
    to a half); of blocks, by their mean square."""
    if pattern == "unstructured":
        if each_row:
            return _lowest_in_rows(scores, round(share * scores.shape[1]))
        return lowest(scores, round(share * scores.numel()))
    if pattern == "2:4":
        candidates = _two_of_four(scores)
        if share == 0.5:
            return candidates
        count = round(2 * share * int(candidates.sum()))
        return lowest(scores.masked_fill(~candidates, torch.inf), count)
    return lowest_blocks(block_sums(scores * scores.abs(), block), share, scores.shape, block)


def _two_of_four(scores: torch.Tensor) -> torch.Tensor:
    n, k = scores.shape
    fours = F.pad(scores, (0, -k % LANE_K), value=-torch.inf).view(n, -1, LANE_K)
    order = fours.sort(dim=-1, stable=True).indices
    chosen = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return chosen.view(n, -1)[:, :k]


def lowest_blocks(
    sums: torch.Tensor, share: float, shape: tuple[int, int], block: tuple[int, int]
) -> torch.Tensor:
    """The ``share`` of blocks whose ``sums [n / R, k / C]`` are the lowest, each divided by its
    number of weights, of a matrix of this ``shape``; bool ``[n, k]``."""
    counts = block_sums(sums.new_ones(shape), block)
    chosen = lowest(sums / counts, round(share * sums.numel()))
    rows = chosen.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def block_sums(matrix: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """``[n, k]`` -> ``[n / R, k / C]``, rounded up: the sum of each block."""
    (n, k), (rows, columns) = matrix.shape, block
    whole = F.pad(matrix, (0, -k % columns, 0, -n % rows))
    return whole.unflatten(1, (-1, columns)).sum(2).unflatten(0, (-1, rows)).sum(1)


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool, of the shape of ``scores``: the ``count`` lowest."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(count, largest=False, sorted=False).indices] = True
    return chosen.view(scores.shape)


def _lowest_in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    indices = scores.topk(count, dim=1, largest=False, sorted=False).indices
    return chosen.scatter_(1, indices, True)
