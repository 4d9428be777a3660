"""Hugging Face folders whose matrices lie in integer codes: what their layouts have in common.

Each of them stores ``w = s (q - z)``: a code ``q`` for each weight, a scale ``s`` and a zero point
``z``, an integer, for each group of columns of a row.  This library's formats hold ``s`` and
``o = -z s``: the codes are taken over, and nothing is rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from memlm import formats
from memlm.errors import FormatError
from memlm.formats import TILE_ROWS, ZEROS, Format
from memlm.io.checkpoint import Checkpoint, PackedTensor
from memlm.io.huggingface import Folder

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEFAULT_GROUP = 128  # of GPTQ and AWQ configs that name none, as transformers has it
_MAX_SCHEMES = 100
_CHUNK = 1 << 22  # weights unpacked at a time: 4 MB of codes, and a few such temporaries


def open_quantized(folder: Folder) -> Checkpoint:
    """The folder read by the rules of its ``quantization_config``: compressed-tensors
    (pack-quantized), GPTQ or AWQ.

    Raises FormatError for another ``quant_method``, a config that is malformed or asks for what is
    not read here, and tensors that do not belong together.
    """
    from memlm.io.awq import AWQ
    from memlm.io.compressed_tensors import CompressedTensors
    from memlm.io.gptq import GPTQ

    readers = {"compressed-tensors": CompressedTensors, "gptq": GPTQ, "awq": AWQ}
    config = folder.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in readers:
        raise FormatError(
            f"{folder.path}: quantization_config: quant_method {method!r:.80} is not read here; "
            f"read are memlm, {', '.join(readers)}"
        )
    return readers[method](folder)


@dataclass(frozen=True)
class Matrix:
    """``W[n, k]`` as a checkpoint holds it.

    bits: per code: 2, 4 or 8.
    group: columns that share a scale; ``k`` for one scale per row.
    rows: ``rows(start, stop)`` -> codes uint8 ``[stop - start, k]``, in ``0 .. 2 ** bits - 1``;
        ``start`` is a multiple of 16, and so is ``stop`` unless it is ``n``.
    scales: f16, bf16 or f32 ``[n, groups]``.
    zeros: integers ``[n, groups]``: the code that stands for 0.
    g_idx: ``[k]``, the group of each column; None: ``j // group``.
    """

    n: int
    k: int
    bits: int
    group: int
    rows: Callable[[int, int], torch.Tensor]
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor | None = None

    def _chunks(self) -> Iterator[tuple[int, int]]:
        step = max(_CHUNK // self.k // TILE_ROWS, 1) * TILE_ROWS
        for start in range(0, self.n, step):
            yield start, min(start + step, self.n)

    def dequantize(self) -> torch.Tensor:
        """f32 ``[n, k]``, each weight rounded at most once."""
        columns = torch.arange(self.k) // self.group if self.g_idx is None else self.g_idx.long()
        w = torch.empty(self.n, self.k)
        for start, stop in self._chunks():
            part = w[start:stop]
            part.copy_(self.rows(start, stop))
            part -= self.zeros[start:stop].float()[:, columns]
            part *= self.scales[start:stop].float()[:, columns]
        return w

    def pack(self) -> PackedTensor | None:
        """In this library's layout; None where none of its formats holds exactly this."""
        grid, order = self._grid(), None
        if grid is None:
            return None
        format, scales, offsets = grid
        if self.g_idx is not None:
            in_order = torch.arange(self.k) // self.group
            if not torch.equal(self.g_idx.long(), in_order):
                order = self.g_idx.argsort(stable=True)
                if not torch.equal(self.g_idx[order].long(), in_order):
                    return None  # groups of other sizes
        parts = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in formats.layout(
                format, self.n, self.k, scales.dtype
            ).items()
        }
        for start, stop in self._chunks():
            q = self.rows(start, stop)
            if order is not None:
                q = q[:, order]
            if self.bits == 8:
                q = (q ^ 128).view(torch.int8)  # q - 128
            chunk = formats.pack(
                q, scales[start:stop], None if offsets is None else offsets[start:stop], format
            )
            tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
            for name, tensor in chunk.tensors().items():
                parts[name][tiles] = tensor
        packed = formats.Packed(format, self.n, self.k, **parts)
        return PackedTensor(packed, None if order is None else order.int())

    def _grid(self) -> tuple[Format, torch.Tensor, torch.Tensor | None] | None:
        """The format, its scales and its offsets ``[n, groups]``, or None where there is none."""
        # Scales are repeated where a group is a multiple of one that there is a format for.
        if self.group < self.k:
            fitting = [g for g in formats.GROUPS[self.bits] if g and self.group % g == 0]
            if not fitting:
                return None
            group = max(fitting)
            repeats = self.group // group
        else:
            group = 0 if self.bits == 8 else max(formats.GROUPS[self.bits])
            repeats = -(-self.k // group) if group else 1
        symmetric_zero = ZEROS[self.bits] + (128 if self.bits == 8 else 0)
        symmetric = bool((self.zeros == symmetric_zero).all())
        if self.bits == 8 and not symmetric:
            return None
        format = Format(self.bits, group, symmetric)
        grid = [self.scales.float()]
        if not symmetric:
            exact = -self.zeros.double() * self.scales.double()
            grid.append(exact.float())
            if not torch.equal(grid[1].double(), exact):
                return None
        if all(torch.equal(part.half().float(), part) for part in grid):
            grid = [part.half() for part in grid]
        groups = format.groups(self.k)
        scales, *offsets = (part.repeat_interleave(repeats, 1)[:, :groups] for part in grid)
        return format, scales, offsets[0] if offsets else None


class QuantizedFolder(ABC):
    """A folder in which a module's ``weight`` is stored as several tensors; the others are as
    Hugging Face has them.  A :class:`memlm.io.checkpoint.Checkpoint`; subclasses say which tensors
    make a matrix, and how.

    Raises FormatError where a module lacks one of them or has one too many.
    """

    packs = True
    CODES: str  # the tensor that makes a module a quantised one
    REQUIRED: tuple[str, ...]
    OPTIONAL: tuple[str, ...] = ()

    def __init__(self, folder: Folder):
        self._folder, self.path, self.config = folder, folder.path, folder.config
        parts = defaultdict(set)
        for name in folder.names():
            module, _, part = name.rpartition(".")
            parts[module].add(part)
        known = {self.CODES, *self.REQUIRED, *self.OPTIONAL}
        for module, has in parts.items():
            if missing := sorted({self.CODES, *self.REQUIRED} - has) if known & has else []:
                raise FormatError(f"{folder.path}: {module}.{missing[0]}: is missing")
            if extra := sorted(has - known - {"bias"}) if self.CODES in has else []:
                raise FormatError(
                    f"{folder.path}: {module}.{extra[0]}: is not known beside {self.CODES}"
                )
        self._parts = {module: has for module, has in parts.items() if self.CODES in has}

    def names(self) -> list[str]:
        """Hugging Face's names: ``weight`` for what makes up a quantised one."""
        names = []
        for name in self._folder.names():
            module, _, part = name.rpartition(".")
            if module not in self._parts or part == "bias":
                names.append(name)
            elif part == self.CODES:
                names.append(f"{module}.weight")
        return names

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, mapped; a quantised weight dequantised to f32.  KeyError for an unknown name,
        FormatError for tensors that do not fit together or scales with NaN or Inf."""
        matrix = self._find(name)
        return self._folder.tensor(name) if matrix is None else matrix.dequantize()

    def packed(self, name: str) -> PackedTensor | None:
        """A quantised weight as it is; None where it is stored as floats, or no format of this
        library holds it exactly.  Raises as :meth:`tensor`."""
        matrix = self._find(name)
        if matrix is None:
            self._folder.tensor(name)  # KeyError
            return None
        return matrix.pack()

    def coded(self, name: str) -> bool:
        return self._find(name) is not None

    def maps(self, name: str) -> bool:
        return not self.coded(name) and self._folder.maps(name)

    def read_ahead(self, name: str) -> None:
        for part in self._stored(name):
            self._folder.read_ahead(part)

    def release(self, name: str) -> None:
        for part in self._stored(name):
            self._folder.release(part)

    def _stored(self, name: str) -> list[str]:
        """The names in the file of what makes up this tensor."""
        module, _, part = name.rpartition(".")
        if part != "weight" or module not in self._parts:
            return [name]
        return [f"{module}.{part}" for part in self._parts[module] - {"bias"}]

    def _find(self, name: str) -> Matrix | None:
        """The quantised matrix of this name, None for a tensor that is stored as it is."""
        module, _, part = name.rpartition(".")
        if module not in self._parts or part == "bias":
            return None
        if part != "weight":
            raise KeyError(name)
        return self._matrix(module)

    @abstractmethod
    def _matrix(self, module: str) -> Matrix:
        """The matrix that a quantised module's tensors make."""

    # --- what subclasses read and check with ----------------------------------------------------

    def _error(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}")

    def _setting(self, config: dict, key: str, accepted: tuple, default=None):
        """One of the ``accepted`` values, also where JSON has 4.0 or true for another."""
        value = config.get(key, default)
        if not any(type(value) is type(a) and value == a for a in accepted):
            raise self._error(
                f"quantization_config: {key} is {value!r:.80}; read are "
                f"{', '.join(repr(a) for a in accepted)}"
            )
        return value

    def _group_size(self, config: dict, default: int) -> int | None:
        """``group_size``; None: one group per row, which is written as -1."""
        value = config.get("group_size", default)
        if type(value) is not int or (value < 1 and value != -1):
            raise self._error(
                f"quantization_config: group_size is {value!r:.80}; read are positive integers "
                "and -1"
            )
        return None if value == -1 else value

    def _few(self, schemes: set) -> set:
        """Each module is compared with all of them."""
        if len(schemes) > _MAX_SCHEMES:
            raise self._error(
                f"quantization_config: {len(schemes)} different schemes; at most {_MAX_SCHEMES} "
                "are read"
            )
        return schemes

    def _part(
        self, module: str, part: str, dims: int | None, *dtypes: torch.dtype
    ) -> torch.Tensor:
        """A tensor of a module, of one of these types and with some elements."""
        name = f"{module}.{part}"
        tensor = self._folder.tensor(name)
        if tensor.dtype not in dtypes or dims not in (None, tensor.dim()) or tensor.numel() == 0:
            dimensions = "" if dims is None else f"{dims}-dimensional "
            raise self._error(
                f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected a {dimensions}tensor "
                f"of {' or '.join(map(str, dtypes))}"
            )
        return tensor

    def _scales(self, module: str, part: str, dims: int | None = None) -> torch.Tensor:
        scales = self._part(module, part, dims, *SCALE_DTYPES)
        if not scales.isfinite().all():
            raise self._error(f"{module}.{part}: contains NaN or Inf")
        return scales

    def _check_shape(self, module: str, part: str, tensor: torch.Tensor, *shape: int) -> None:
        if tuple(tensor.shape) != shape:
            raise self._error(
                f"{module}.{part}: got shape {list(tensor.shape)}, expected {list(shape)}"
            )

    def _g_idx(self, module: str, part: str, k: int, groups: int) -> torch.Tensor:
        g_idx = self._part(module, part, 1, torch.int32, torch.int64)
        self._check_shape(module, part, g_idx, k)
        low, high = (int(x) for x in g_idx.aminmax())
        if low < 0 or high >= groups:
            raise self._error(
                f"{module}.{part}: got groups {low} to {high}, there are scales for 0 to "
                f"{groups - 1}"
            )
        return g_idx
