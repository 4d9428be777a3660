"""What weights are worth that are taken out without changing the others."""

from __future__ import annotations

import torch

from memlm.prune.patterns import smallest


def magnitude(
    weight: torch.Tensor, sparsity: float, pattern: str, block: tuple[int, int]
) -> torch.Tensor:
    """Which of ``weight [n, k]`` go, bool: the smallest of the layer; blocks by their norm."""
    return smallest(weight.abs(), sparsity, pattern, block)


def wanda(
    weight: torch.Tensor,
    squares: torch.Tensor,
    sparsity: float,
    pattern: str,
    block: tuple[int, int],
) -> torch.Tensor:
    """Which of ``weight [n, k]`` go, bool, by ``|w_ij| ||x_j||`` (Wanda, arXiv:2306.11695), where
    ``squares [k]`` are the ||x_j||^2 of the calibration: the smallest of each row; blocks by the
    sum of squares, which is what the layer's result loses where inputs are uncorrelated."""
    scores = weight.abs() * squares.sqrt().to(weight.dtype)
    return smallest(scores, sparsity, pattern, block, each_row=True)
