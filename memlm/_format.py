"""Formats by name, without tensors: :mod:`memlm.formats` draws them and packs torch tensors,
:mod:`memlm.arrays` numpy arrays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

VERSION = 1
FOLDER_VERSION = 2  # of packed folders, memlm/io/packed_folder.py
# A packed matrix's tensors, and what a packed folder calls them: <module>.weight and so on.
FILE_PARTS = {
    "codes": "weight", "scales": "scales", "offsets": "offsets", "starts": "starts", "places": "places",
    "order": "order",
}  # fmt: skip
TILE_ROWS = 16  # rows side by side in a block
LANE_K = 4  # consecutive k of one row inside a 32-bit lane
ACT_GROUP = 32  # activations share a scale over 32 k; K is padded to a multiple of it
# Bits -> groups; 0: one scale per row.
GROUPS = {2: (32, 64, 128), 4: (32, 64, 128), 8: (0, 32, 64, 128)}
ZEROS = {2: 1, 4: 8, 8: 0}  # bits -> what symmetric codes have subtracted
# What a kind alone means: the most accurate of each, but for nf4 and ternary, whose authors' groups
# are taken (64, and in want of whole rows the largest).
DEFAULTS = {
    "int4": "int4a-g32",
    "int8": "int8-g32",
    "int2": "int2a-g32",
    "nf4": "nf4-g64",
    "ternary": "ternary-g128",
}
# Bits per weight -> mode of arithmetic.  Rounding the activations to 8 bits costs less than rounding
# weights to 4 does, but more than rounding them to 8: on SmolLM2 0.003 nats of KL, against 0.2 and
# 0.001.  16 and 32 are the floats of sparse matrices, which are multiplied in f32 in either mode.
DEFAULT_MODES = {2: "fast", 4: "fast", 8: "accurate", 16: "accurate", 32: "accurate"}
# NormalFloat (QLoRA, arXiv:2305.14314, appendix E): quantiles of a normal distribution, cut at its
# two ends to 1, with a zero.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Where weights of a sparse matrix may stand, and the types of unquantised ones in it -> bits.
PATTERNS = ("block", "2:4", "unstructured")
FLOATS = {"f32": 32, "bf16": 16}
# What a kind alone means in a sparse matrix: DEFAULTS, but that a block has one scale per row and
# 32 k, and that an offset has no place where nothing is stored.
SPARSE_DEFAULTS = {
    "block": {
        "int4": "int4a-g32", "int8": "int8-g32", "int2": "int2a-g32", "nf4": "nf4-g32",
        "ternary": "ternary-g32",
    },
    "2:4": {"int4": "int4-g32", "nf4": "nf4-g64"},
    "unstructured": {"int4": "int4-g32", "nf4": "nf4-g64"},
}  # fmt: skip
# What codes stand for -> bits.
CODEBOOKS = {"int": tuple(GROUPS), "nf": (4,), "ternary": (2,)}

_NAME = re.compile(
    r"(?:(?P<kind>int|nf)(?P<bits>\d)(?P<asym>a?)|(?P<ternary>ternary))-(?:row|g(?P<group>[1-9]\d*))"
)


@dataclass(frozen=True)
class Format:
    """What a packed matrix holds: ``bits`` per code, ``group`` of k per scale (0: the whole row),
    ``symmetric`` or with an offset, and the ``codebook``, what codes stand for: numbers (``int``),
    quantiles (``nf``), or -1, 0, 1 (``ternary``).

    Raises ValueError for a combination that no kernel executes.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    codebook: str = "int"

    def __post_init__(self):
        if self.bits not in GROUPS:
            raise ValueError(f"bits: got {self.bits!r}, accepted are {sorted(GROUPS)}")
        if self.group not in GROUPS[self.bits]:
            raise ValueError(
                f"group: got {self.group!r}, accepted for {self.bits} bits are {GROUPS[self.bits]}"
                " (0: one scale per row)"
            )
        if self.bits not in CODEBOOKS.get(self.codebook, ()):
            raise ValueError(
                f"codebook: got {self.codebook!r} for {self.bits} bits, accepted are "
                f"{[c for c, bits in CODEBOOKS.items() if self.bits in bits]}"
            )
        if not self.symmetric and (self.bits == 8 or self.codebook != "int"):
            raise ValueError("symmetric: 8-bit, nf4 and ternary weights are symmetric only")

    @property
    def kind(self) -> str:
        """The name without the group: ``int4a``."""
        if self.codebook == "ternary":
            return "ternary"
        return f"{self.codebook}{self.bits}{'' if self.symmetric else 'a'}"

    @property
    def name(self) -> str:
        return f"{self.kind}-{f'g{self.group}' if self.group else 'row'}"

    @property
    def codes(self) -> range:
        """The codes that are in use."""
        if self.bits == 8:
            return range(-128, 128)
        return range(3 if self.codebook == "ternary" else 1 << self.bits)

    @property
    def levels(self) -> tuple[float, ...]:
        """What the codes 0, 1, ... of fewer than 8 bits stand for, in scales; 2 ** bits of them.
        Asymmetric codes stand for themselves."""
        if self.codebook == "nf":
            return NF4_LEVELS
        zero = ZEROS[self.bits] if self.symmetric else 0
        return tuple(float(code - zero) for code in range(1 << self.bits))

    @classmethod
    def parse(cls, spec: str | Format) -> Format:
        """The format of a name such as ``int4-g32``; ``int4`` and ``int8`` mean ``DEFAULTS``."""
        if isinstance(spec, Format):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"format: got {type(spec).__name__}, accepted are a name or a Format")
        match = _NAME.fullmatch(DEFAULTS.get(spec, spec))
        if not match:
            raise ValueError(
                f"format: got {spec!r}, accepted are int8-gG, int4-gG, int4a-gG, nf4-gG, int2-gG, "
                "int2a-gG, ternary-gG (G = 32, 64, 128; none: a default) and int8-row"
            )
        group = int(match["group"] or 0)
        if match["ternary"]:
            return cls(2, group, codebook="ternary")
        return cls(int(match["bits"]), group, not match["asym"], match["kind"])

    def padded_k(self, k: int) -> int:
        """``k`` rounded up to a whole number of groups (and of activation groups)."""
        step = max(self.group, ACT_GROUP)
        return -(-k // step) * step

    def groups(self, k: int) -> int:
        """Scales per row."""
        return self.padded_k(k) // self.group if self.group else 1

    def bytes_per_weight(self, scale_bytes: int = 2) -> float:
        """Stored bytes per weight for large n and k (without padding)."""
        per_group = scale_bytes * (1 if self.symmetric else 2)
        return self.bits / 8 + (per_group / self.group if self.group else 0)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class SparseFormat:
    """What a sparse matrix holds: ``pattern``, where its weights may stand, and ``values``, what
    they are: a :class:`Format`, or ``"f32"`` or ``"bf16"``.

    ``block`` takes formats of group 32, f32 and bf16; ``2:4`` and ``unstructured`` symmetric ones
    of 4 bits.  Raises ValueError for others.
    """

    pattern: str
    values: Format | str

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern: got {self.pattern!r}, accepted are {PATTERNS}")
        fits = isinstance(self.values, Format)
        if self.pattern == "block":
            fits = self.values.group == ACT_GROUP if fits else self.values in FLOATS
        else:
            fits = fits and self.values.bits == 4 and self.values.symmetric
        if not fits:
            accepted = {"block": f"f32, bf16 and formats of group {ACT_GROUP}"}
            raise ValueError(
                f"values: got {self.values}, accepted in {self.pattern} are "
                f"{accepted.get(self.pattern, 'symmetric formats of 4 bits')}"
            )

    @property
    def is_float(self) -> bool:
        """Whether the values are floats, without scales."""
        return not isinstance(self.values, Format)

    @property
    def bits(self) -> int:
        """Per value."""
        return FLOATS[self.values] if self.is_float else self.values.bits

    @property
    def symmetric(self) -> bool:
        return self.is_float or self.values.symmetric

    @property
    def name(self) -> str:
        return f"{self.pattern}/{self.values}"

    @classmethod
    def parse(cls, spec: str | SparseFormat) -> SparseFormat:
        """The format of a name such as ``block/int4-g32``, ``2:4/int4``."""
        if isinstance(spec, SparseFormat):
            return spec
        if not isinstance(spec, str):
            got = type(spec).__name__
            raise TypeError(f"format: got {got}, accepted are a name or a SparseFormat")
        pattern, slash, values = spec.partition("/")
        if not slash or pattern not in PATTERNS:
            raise ValueError(
                f"format: got {spec!r}, accepted are PATTERN/VALUES, PATTERN one of {PATTERNS}, "
                f"VALUES a format's name, f32 or bf16"
            )
        values = SPARSE_DEFAULTS[pattern].get(values, values)
        return cls(pattern, values if values in FLOATS else Format.parse(values))

    def padded_k(self, k: int) -> int:
        """``k`` rounded up to a whole number of blocks, or groups."""
        return -(-k // ACT_GROUP) * ACT_GROUP if self.is_float else self.values.padded_k(k)

    def __str__(self) -> str:
        return self.name


def parse_format(spec: str | Format | SparseFormat) -> Format | SparseFormat:
    """The dense or, with a pattern, sparse format of a name."""
    sparse = isinstance(spec, SparseFormat) or (isinstance(spec, str) and "/" in spec)
    return SparseFormat.parse(spec) if sparse else Format.parse(spec)
