"""Every Triton kernel with what it is compiled for: types, constants, and the configurations that a target
has room for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from memlm.kernels import _rows, _weight_only, adamw_8bit, dequantize, linear_cross_entropy, linear_cross_entropy_backward, quantize_rows, w8a8_matmul
from memlm.kernels._targets import Target


@dataclass(frozen=True)
class Specimen:
    name: str
    kernel: object
    types: dict[str, str]  # of pointers; other arguments are 32-bit integers unless constants
    constants: dict = field(default_factory=dict)
    config: str = ""
    warps: int = 4
    stages: int = 3
    divisible: tuple[str, ...] = ()  # integers that are multiples of 16

    @property
    def signature(self) -> dict[str, str]:
        kinds = {name: "constexpr" for name in self.constants} | self.types
        return {name: kinds.get(name, "i32") for name in self.kernel.arg_names}

    @property
    def aligned(self) -> list[int]:
        wanted = {n for n, kind in self.types.items() if kind.startswith("*")} | set(self.divisible)
        return [i for i, name in enumerate(self.kernel.arg_names) if name in wanted]


FORMATS = {  # bits, zero, levels, offsets, step
    "w2_matmul": {"int2a-g32": (2, 0, False, True, 32), "ternary-g128": (2, 1, False, False, 64)},
    "w4_matmul": {
        "int4a-g32": (4, 0, False, True, 32), "int4-g128": (4, 8, False, False, 64),
        "nf4-g64": (4, 0, True, False, 64),
    },
    "w8_matmul": {"int8-g32": (8, 0, False, False, 32), "int8-row": (8, 0, False, False, 64)},
}  # fmt: skip
NAMES = {"fp16": "f16", "bf16": "bf16"}


def _dtypes(target: Target) -> tuple[str, ...]:
    return ("fp16",) if target.arch == 75 else ("fp16", "bf16")


def _configs(target: Target, step: int, bits: int, swiglu: bool) -> list:
    """Those for many rows and for few, whose sums are split, with their names."""
    of = (step, bits, swiglu)
    found = {id(c): c for rows in (128, _weight_only.SPLIT_ROWS) for c in _weight_only.pruned(target, rows, *of)}
    named = []
    for config in found.values():
        rows, columns, splits = (config.kwargs[key] for key in ("BLOCK_M", "BLOCK_N", "SPLITS"))
        split = f" split {splits}" if splits > 1 else ""
        named.append((f"{rows}x{' swiglu ' if swiglu else ''}{columns}{split}", config))
    return named


def _weight_only_specimens(target: Target) -> Iterator[Specimen]:
    for op, formats in FORMATS.items():
        for format, (bits, zero, levels, offsets, step) in formats.items():
            for dtype in _dtypes(target):
                for swiglu in (False, True):
                    for label, config in _configs(target, step, bits, swiglu):
                        settings = config.kwargs
                        yield Specimen(
                            f"{op} {format} {NAMES[dtype]}",
                            _weight_only.weight_only_kernel,
                            {
                                "x": f"*{dtype}", "words": "*i32", "scales": "*fp16", "offsets": "*fp16",
                                "levels": "*fp32", "bias": f"*{dtype}", "residual": f"*{dtype}",
                                "y": f"*{dtype}", "partial": "*fp32",
                            },
                            {
                                "BITS": bits, "ZERO": zero, "LEVELS": levels, "OFFSETS": offsets,
                                "BIAS": True, "SWIGLU": swiglu, "RESIDUAL": True, "STEP": step, **settings,
                            },
                            label,
                            config.num_warps, config.num_stages, ("n", "k", "x_stride"),
                        )  # fmt: skip


def _other_specimens(target: Target) -> Iterator[Specimen]:
    for dtype in _dtypes(target):
        yield Specimen(
            f"rms_norm {NAMES[dtype]}", _rows.rms_norm_kernel,
            {"x": f"*{dtype}", "norm": f"*{dtype}", "out": f"*{dtype}", "eps": "fp32"},
            {"BLOCK": 1024}, divisible=("k", "x_stride"),
        )  # fmt: skip
        flags = {"BIAS": True, "SWIGLU": True, "RESIDUAL": True, "SPLITS": 8}
        yield Specimen(
            f"add_splits {NAMES[dtype]}", _weight_only.add_splits_kernel,
            {"partial": "*fp32", "bias": f"*{dtype}", "residual": f"*{dtype}", "y": f"*{dtype}"},
            {**flags, "BLOCK_M": 16, "BLOCK_N": 64}, divisible=("n",),
        )  # fmt: skip
        for kind, whole in (("whole", True), ("groups", False)):
            yield Specimen(
                f"add_int8_splits {kind} {NAMES[dtype]}", w8a8_matmul.add_splits_kernel,
                {
                    "partial": "*i32" if whole else "*fp32", "x_scales": "*fp32", "scales": "*fp16",
                    "bias": f"*{dtype}", "residual": f"*{dtype}", "y": f"*{dtype}",
                },
                {**flags, "WHOLE": whole, "BLOCK_M": 16, "BLOCK_N": 64}, divisible=("n",),
            )  # fmt: skip


def _int8_specimens(target: Target) -> Iterator[Specimen]:
    dtype = "fp16"
    integers = target.arch != 75
    for kind, whole, group in (("int8-row", True, 0), ("int8-g32", False, 32)):
        step = w8a8_matmul.step_of(group, 0, integers)
        for swiglu in (False, True):
            for label, config in _configs(target, step, 8, swiglu):
                settings = config.kwargs
                yield Specimen(
                    f"w8a8_matmul {kind} f16", w8a8_matmul.w8a8_kernel,
                    {
                        "x": "*i8", "x_scales": "*fp32", "words": "*i32", "scales": "*fp16",
                        "bias": f"*{dtype}", "residual": f"*{dtype}", "y": f"*{dtype}",
                        "partial": "*i32" if whole else "*fp32",
                    },
                    {
                        "WHOLE": whole, "INTEGERS": integers, "BIAS": True, "SWIGLU": swiglu,
                        "RESIDUAL": True, "STEP": step, **settings,
                    },
                    label,
                    config.num_warps, config.num_stages, ("n", "k", "x_stride"),
                )  # fmt: skip


def _row_specimens(target: Target) -> Iterator[Specimen]:
    for dtype in _dtypes(target):
        for group in (0, 32):
            yield Specimen(
                f"quantize_rows {group or 'row'} {NAMES[dtype]}", quantize_rows.quantize_rows_kernel,
                {"x": f"*{dtype}", "norm": f"*{dtype}", "codes": "*i8", "scales": "*fp32", "eps": "fp32"},
                {"NORM": True, "GROUP": group, "BLOCK": 1024}, divisible=("k", "x_stride"),
            )  # fmt: skip
        for name, ids, block in (("dequantize", False, 16), ("embedding", True, 1)):
            yield Specimen(
                f"{name} int4a-g32 {NAMES[dtype]}", dequantize.rows_kernel,
                {
                    "words": "*i32", "scales": "*fp16", "offsets": "*fp16", "levels": "*fp32", "ids": "*i64",
                    "y": f"*{dtype}",
                },
                {
                    "BITS": 4, "ZERO": 0, "LEVELS": False, "OFFSETS": True, "IDS": ids, "BLOCK_R": block,
                    "BLOCK_K": dequantize.BLOCK_K,
                },
                divisible=("k",),
            )  # fmt: skip


def _training_specimens(target: Target) -> Iterator[Specimen]:
    for dtype in ("fp32", *_dtypes(target)):
        floats = "beta1 rest1 beta2 rest2 decay step_size unbias eps".split()
        yield Specimen(
            f"adamw_8bit {NAMES.get(dtype, 'f32')}", adamw_8bit.adamw_8bit_kernel,
            {
                "param": f"*{dtype}", "grad": f"*{dtype}", "exp_avg": "*u8", "exp_avg_absmax": "*fp32",
                "exp_avg_sq": "*u8", "exp_avg_sq_absmax": "*fp32", "books": "*fp32",
                **dict.fromkeys(floats, "fp32"),
            },
            {"BLOCKS": adamw_8bit.BLOCKS, "BLOCK": 256, "SIZE": adamw_8bit.SIZE.value},
        )  # fmt: skip


def _cross_entropy_specimens(target: Target) -> Iterator[Specimen]:
    config = linear_cross_entropy.config_of(target)
    settings = {"BIAS": True, **config.kwargs}
    label = "x".join(map(str, config.kwargs.values()))
    strides = ("k", "hidden_stride", "weight_stride")
    for dtype in _dtypes(target):
        given = {"hidden": f"*{dtype}", "weight": f"*{dtype}", "bias": f"*{dtype}", "targets": "*i64"}
        yield Specimen(
            f"linear_cross_entropy {NAMES[dtype]}", linear_cross_entropy.loss_parts_kernel,
            {**given, "parts": "*fp32"}, settings, label, config.num_warps, config.num_stages, strides,
        )  # fmt: skip
        yield Specimen(
            f"linear_cross_entropy_backward {NAMES[dtype]}", linear_cross_entropy_backward.logit_gradient_kernel,
            {**given, "lse": "*fp32", "grad": "*fp32", "out": f"*{dtype}", "ignore_index": "i64", "smoothing": "fp32"},
            settings, label, config.num_warps, config.num_stages, (*strides, "words"),
        )  # fmt: skip
    yield Specimen(
        "join_losses", linear_cross_entropy.join_kernel,
        {
            "parts": "*fp32", "targets": "*i64", "losses": "*fp32", "lse": "*fp32", "ignore_index": "i64",
            "smoothing": "fp32",
        },
        {"BLOCK": 128},
    )  # fmt: skip


def specimens(target: Target) -> Iterator[Specimen]:
    yield from _weight_only_specimens(target)
    yield from _int8_specimens(target)
    yield from _row_specimens(target)
    yield from _other_specimens(target)
    yield from _training_specimens(target)
    yield from _cross_entropy_specimens(target)
