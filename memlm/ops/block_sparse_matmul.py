"""``block_sparse_matmul``: y = x W^T + bias over stored blocks of W, and its gradients."""

from __future__ import annotations

import torch

from memlm import sparse_formats
from memlm.formats import ACT_GROUP, CODEBOOKS, Format, to_tiles
from memlm.ops import _matmul, _registry
from memlm.sparse_formats import FLOATS, SparseFormat, SparsePacked, SparseTensors

ARGUMENTS = (
    "x starts places codes scales offsets bits codebook n k bias fast norm eps swiglu residual"
)  # as the schema
_WEIGHTS = "starts places codes scales offsets bits codebook n k".split()
_VALUES = {bits: values for values, bits in FLOATS.items()}


def _format(bits: int, symmetric: bool, codebook: int) -> SparseFormat:
    values = _VALUES.get(bits)
    return SparseFormat(
        "block", values or Format(bits, ACT_GROUP, symmetric, list(CODEBOOKS)[codebook])
    )


def _weights(kind: type, starts, places, codes, scales, offsets, bits, codebook, n, k):
    """The op's arguments as ``kind``: SparsePacked, or SparseTensors, whose contents are unknown."""
    format = _format(bits, offsets is None, codebook)
    return kind(format, n, k, codes, scales, offsets, starts, places)


def _of(given: dict, kind: type = SparsePacked):
    return _weights(kind, *(given[name] for name in _WEIGHTS))


def _reference(given: dict) -> torch.Tensor:
    x, packed = given["x"], _of(given)
    bias, fast = given["bias"], given["fast"]
    norm, eps, swiglu, residual = (given[key] for key in ("norm", "eps", "swiglu", "residual"))
    if not packed.format.is_float:
        dense = sparse_formats.to_dense(packed)
        return _matmul.reference(x, dense, bias, fast, norm, eps, swiglu, residual)
    _matmul.check(x, packed, bias, norm, swiglu, residual)
    w = sparse_formats.dequantize(packed)
    return _matmul.reference_of_floats(x, w, bias, False, norm, eps, swiglu, residual)


def _fake(given: dict) -> torch.Tensor:
    around = (given[key] for key in ("bias", "norm", "swiglu", "residual"))
    return _matmul.fake(given["x"], _of(given, SparseTensors), *around)


def _grad_x(grad: torch.Tensor, given: dict) -> torch.Tensor:
    weights = (given[name] for name in _WEIGHTS)
    rows = grad.reshape(-1, given["n"]).float()
    product = torch.ops.memlm.block_sparse_grad_x(rows, *weights)
    return product.view(*grad.shape[:-1], given["k"]).to(grad.dtype)


def _grad_codes(grad: torch.Tensor, left: torch.Tensor, given: dict) -> torch.Tensor:
    n, k = given["n"], given["k"]
    rows = grad.reshape(-1, n).float(), left.reshape(-1, k).float()
    places = (given["starts"], given["places"], n, k)
    return torch.ops.memlm.block_sparse_grad_values(*rows, *places).to(given["codes"].dtype)


_op = _matmul.define(
    "block_sparse_matmul", ARGUMENTS, _reference, _fake, _grad_x, _grad_codes
)


def _check_rows(name: str, rows: torch.Tensor, columns: int) -> None:
    if rows.dtype != torch.float32:
        raise TypeError(f"{name}: got {rows.dtype}, expected torch.float32")
    if rows.dim() != 2 or rows.shape[1] != columns:
        raise ValueError(f"{name}: got shape {list(rows.shape)}, expected [m, {columns}]")


def _grad_x_fake(grad, *weights):
    packed = _weights(SparseTensors, *weights)
    _check_rows("grad", grad, packed.n)
    return grad.new_empty(grad.shape[0], packed.k)


def _grad_x_reference(grad, *weights):
    _grad_x_fake(grad, *weights)
    return grad @ sparse_formats.dequantize(_weights(SparsePacked, *weights))


def _values_of(kind: type, grad, starts, places, n: int, k: int):
    """A W with the places of these blocks, and any values."""
    codes = grad.new_empty(places.shape[0], ACT_GROUP, sparse_formats.TILE_ROWS)
    return kind(SparseFormat("block", "f32"), n, k, codes, None, None, starts, places)


def _grad_values_fake(grad, x, starts, places, n, k):
    w = _values_of(SparseTensors, grad, starts, places, n, k)
    _check_rows("grad", grad, n)
    _check_rows("x", x, k)
    if x.shape[0] != grad.shape[0]:
        raise ValueError(f"x: got {x.shape[0]} rows, expected {grad.shape[0]}, as grad")
    return w.codes


def _grad_values_reference(grad, x, starts, places, n, k):
    _grad_values_fake(grad, x, starts, places, n, k)
    w = _values_of(SparsePacked, grad, starts, places, n, k)
    tiled = to_tiles(grad.T @ x, w.format.padded_k(k)).unflatten(1, (-1, ACT_GROUP))
    return tiled[sparse_formats.positions(w)]


_registry.define("block_sparse_grad_x", _grad_x_reference, _grad_x_fake)
_registry.define("block_sparse_grad_values", _grad_values_reference, _grad_values_fake)


def block_sparse_matmul(
    x: torch.Tensor,
    starts: torch.Tensor,
    places: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    bias: torch.Tensor | None = None,
    fast: bool = True,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    codebook: str = "int",
) -> torch.Tensor:
    """``x W^T + bias`` for ``x [..., k]`` (f32, bf16, f16) and a ``W [n, k]`` of which blocks of 16
    rows and 32 k are stored, the others zero; returns ``[..., n]`` in x's dtype.  Time and bytes go
    by the blocks that are stored.

    ``starts``, ``places``, ``codes``, ``scales`` and ``offsets`` are laid out as
    ``memlm/sparse_formats.py`` draws; ``bits`` is 2, 4 or 8 for packed codes, ``codebook`` ``"int"``
    or with 4 bits ``"nf"``; 32 (f32) and 16 (bf16) for codes that are floats themselves, without
    scales.

    With packed codes, ``fast`` is as for :func:`memlm.ops.w4_matmul`; floats are multiplied in f32
    in both modes.  Inf and NaN of x reach what is stored at their k, and nothing else of their row.
    bias, norm, eps, swiglu and residual are as there.

    Differentiable with respect to x, bias, norm and residual, and to ``codes`` that are floats: on
    the stored blocks only (the product of the gradient and x, sampled there), so that a pruned
    matrix can be trained on without a dense one being made.  On devices without a kernel the plain
    torch reference runs, with a warning.

    Raises TypeError, ValueError or FormatError naming the argument that does not fit: places out of
    range, twice, or in another order among them, before anything is read at them.
    """
    book = 0 if codebook == "int" else _matmul.codebook_index(codebook)
    weights = (starts, places, codes, scales, offsets, bits, book, n, k)
    try:
        return _op(x, *weights, bias, fast, norm, eps, swiglu, residual)
    except Exception:
        # The op checks all of this again; saying what is wrong takes longer than a small product.
        _matmul.check(x, _weights(SparsePacked, *weights), bias, norm, swiglu, residual)
        raise
