"""Every Triton kernel with what it is compiled for: types, constants, and the configurations that a target
has room for."""

from __future__ import annotations

from collections.abc import Iterator

from memlm.kernels._targets import Target

from . import attention, matmul, paged, rows, sparse, training
from .specimen import Specimen


def specimens(target: Target) -> Iterator[Specimen]:
    for of in (matmul, rows, sparse, attention, paged, training):
        yield from of.specimens(target)
