"""``matmul_topk``: the k largest of y = x W^T + bias in each row."""

from __future__ import annotations

import torch

from memlm.formats import Packed
from memlm.ops import _matmul
from memlm.ops._registry import define

# Modes in the order of memlm_mode, csrc/include/memlm.h.
MODES = ("accurate", "fast", "w8a8")


def _packed(given) -> Packed:
    return _matmul.packed_given(given["bits"], given)


_ARGUMENTS = "x codes scales offsets bits codebook n k group bias mode norm eps top".split()


def _reference(*args):
    given = dict(zip(_ARGUMENTS, args))
    packed, x = _packed(given), given["x"]
    bias, norm = (None if t is None else t.float() for t in (given["bias"], given["norm"]))
    if MODES[given["mode"]] == "w8a8":
        rows = _matmul.prologue(x, packed.k, norm, given["eps"]).reshape(-1, packed.k)
        q, scale = _matmul.quantize_activations(rows, 0)
        rows = (q * scale).flatten(1)
        y = _matmul.reference(rows, packed, bias, False, None, 0.0, False, None)
    else:
        fast = MODES[given["mode"]] == "fast"
        y = _matmul.reference(x.float(), packed, bias, fast, norm, given["eps"], False, None)
    # NaN comes first, as in torch.sort, and of equal ones the lowest index.
    values, indices = torch.sort(y, dim=-1, descending=True, stable=True)
    shape = (*x.shape[:-1], given["top"])
    return tuple(t[..., : given["top"]].reshape(shape) for t in (values, indices))


def _fake(*args):
    given = dict(zip(_ARGUMENTS, args))
    check(given["x"], _packed(given), given["bias"], given["norm"], given["top"])
    shape = (*given["x"].shape[:-1], given["top"])
    return given["x"].new_empty(shape, dtype=torch.float32), given["x"].new_empty(
        shape, dtype=torch.int64
    )


_op = define("matmul_topk", _reference, _fake)
_matmul.register_autocast(_op, tuple(_ARGUMENTS.index(name) for name in ("x", "bias", "norm")))


def check(x, packed: Packed, bias, norm, top: int) -> None:
    """Raises TypeError or ValueError naming the argument that does not fit."""
    _matmul.check(x, packed, bias, norm)
    if not 1 <= top <= packed.n:
        raise ValueError(f"top: got {top}, accepted is 1 to {packed.n}, the rows of W")


def matmul_topk(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    group: int,
    bias: torch.Tensor | None = None,
    mode: str = "fast",
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    top: int = 1,
    codebook: str = "int",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``top`` largest elements of each row of ``x W^T + bias``, largest first, and where they
    stand: values f32 and indices int64, both ``[..., top]``.  Of equal elements the one with the
    lowest index comes first; NaN is larger than all numbers, as for ``torch.topk``.

    The other elements are never stored: choosing among 49,152 logits needs no memory for them.

    ``x``, the packed ``W [n, k]`` of ``bits`` 2, 4 or 8, ``bias`` and ``norm`` with ``eps`` are as
    in :func:`memlm.ops.w4_matmul`, ``mode`` as in :func:`memlm.ops.matmul`.  The elements are those
    that op gives for x, bias and norm in f32, whatever x's dtype is: bf16 is not rounded to.

    Not differentiable.  On devices without a kernel the plain torch reference runs, with a warning.

    Raises TypeError, ValueError or FormatError naming the argument that does not fit.
    """
    book = _matmul.codebook_index(codebook)
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, accepted are {MODES}")
    index = MODES.index(mode)
    try:
        return _op(
            x, codes, scales, offsets, bits, book, n, k, group, bias, index, norm, eps, top
        )  # fmt: skip
    except Exception:
        packed = _matmul.packed_of(bits, codes, scales, offsets, n, k, group, book)
        check(x, packed, bias, norm, top)
        raise
