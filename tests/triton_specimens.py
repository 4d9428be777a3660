"""Every Triton kernel with what it is compiled for: types, constants, and the configurations that a target
has room for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from memlm.kernels import (
    _rows, _weight_only, block_sparse_grad_values, block_sparse_grad_x, block_sparse_matmul, dequantize,
    quantize_rows, w4_sparse_dequantize, w4_sparse_matmul, w8a8_matmul,
)  # fmt: skip
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


def _configs(target: Target, step: int, bits: int, swiglu: bool, space=_weight_only.SPACE) -> list:
    """Those for many rows and for few, whose sums are split, with their names."""
    of = (step, bits, swiglu, space)
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


BLOCKS = {  # bits, zero, levels, offsets
    "int4a-g32": (4, 0, False, True), "int8-g32": (8, 0, False, False), "int2-g32": (2, 1, False, False),
    "nf4-g32": (4, 0, True, False), "bf16": (16, 0, False, False), "f32": (32, 0, False, False),
}  # fmt: skip
CODES = {16: "*bf16", 32: "*fp32"}


def _sparse_variants(target: Target, all_of_them: bool, space: list) -> Iterator[tuple]:
    """x's type, swiglu, a label and a configuration; swiglu and bf16 make the difference that they make
    in other formats, too."""
    kinds = [("fp16", False)]
    if all_of_them:
        kinds += [(dtype, True) for dtype in _dtypes(target)]
    for dtype, swiglu in kinds:
        for label, config in _configs(target, 32, 4, False, space):
            yield dtype, swiglu, f"{label}{' swiglu' if swiglu else ''}", config


def _around(dtype: str) -> dict[str, str]:
    return {name: f"*{dtype}" for name in ("x", "bias", "residual", "y")} | {"partial": "*fp32"}


def _block_specimens(target: Target) -> Iterator[Specimen]:
    for format, (bits, zero, levels, offsets) in BLOCKS.items():
        variants = _sparse_variants(target, format in ("int4a-g32", "f32"), block_sparse_matmul.SPACE)
        for dtype, swiglu, label, config in variants:
            yield Specimen(
                f"block_sparse_matmul {format} {NAMES[dtype]}", block_sparse_matmul.block_sparse_kernel,
                {
                    **_around(dtype), "starts": "*i64", "places": "*i32", "codes": CODES.get(bits, "*i32"),
                    "scales": "*fp16", "offsets": "*fp16", "levels": "*fp32",
                },
                {
                    "BITS": bits, "ZERO": zero, "LEVELS": levels, "OFFSETS": offsets,
                    "CUT": target.arch != 75, "BIAS": True, "SWIGLU": swiglu, "RESIDUAL": True,
                    **config.kwargs,
                },
                label,
                config.num_warps, config.num_stages, ("n", "k", "x_stride"),
            )  # fmt: skip


def _compressed_specimens(target: Target) -> Iterator[Specimen]:
    for format, bitmap, levels in (
        ("2:4/int4-g32", False, False), ("2:4/nf4-g64", False, True),
        ("unstructured/int4-g32", True, False), ("unstructured/nf4-g64", True, True),
    ):  # fmt: skip
        types = {
            "codes": "*i32" if bitmap else "*u8", "places": "*i32", "starts": "*i64", "scales": "*fp16",
            "levels": "*fp32",
        }  # fmt: skip
        constants = {"BITMAP": bitmap, "LEVELS": levels}
        for dtype, swiglu, label, config in _sparse_variants(target, not levels, w4_sparse_matmul.SPACE):
            yield Specimen(
                f"w4_sparse_matmul {format} {NAMES[dtype]}", w4_sparse_matmul.w4_sparse_kernel,
                {**_around(dtype), **types},
                {**constants, "BIAS": True, "SWIGLU": swiglu, "RESIDUAL": True, **config.kwargs},
                label,
                config.num_warps, config.num_stages, ("n", "k", "x_stride"),
            )  # fmt: skip
        yield Specimen(
            f"w4_sparse_dequantize {format} f16", w4_sparse_dequantize.sparse_rows_kernel,
            {**types, "y": "*fp16"}, {**constants, "BLOCK_K": w4_sparse_dequantize.BLOCK_K},
            divisible=("k",),
        )  # fmt: skip


def _gradient_specimens() -> Iterator[Specimen]:
    for format, (bits, zero, levels, offsets) in BLOCKS.items():
        yield Specimen(
            f"block_sparse_grad_x {format}", block_sparse_grad_x.grad_x_kernel,
            {
                "grad": "*fp32", "order": "*i64", "tiles": "*i64", "begins": "*i64",
                "codes": CODES.get(bits, "*i32"), "scales": "*fp16", "offsets": "*fp16", "levels": "*fp32",
                "out": "*fp32",
            },
            {
                "BITS": bits, "ZERO": zero, "LEVELS": levels, "OFFSETS": offsets,
                "BLOCK_M": block_sparse_grad_x.BLOCK_M,
            },
            divisible=("n", "k"),
        )  # fmt: skip
    yield Specimen(
        "block_sparse_grad_values f32", block_sparse_grad_values.grad_values_kernel,
        {"grad": "*fp32", "x": "*fp32", "tiles": "*i64", "places": "*i32", "out": "*fp32"},
        {"CHUNK": block_sparse_grad_values.CHUNK}, warps=2, divisible=("n", "k"),
    )  # fmt: skip


def specimens(target: Target) -> Iterator[Specimen]:
    yield from _weight_only_specimens(target)
    yield from _int8_specimens(target)
    yield from _row_specimens(target)
    yield from _block_specimens(target)
    yield from _compressed_specimens(target)
    yield from _gradient_specimens()
    yield from _other_specimens(target)
