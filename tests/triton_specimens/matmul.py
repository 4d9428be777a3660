"""The packed matmuls of dense matrices."""

from __future__ import annotations

from collections.abc import Iterator

from memlm.kernels import _rows, _weight_only, w8a8_matmul
from memlm.kernels._targets import Target

from .specimen import NAMES, Specimen, dtypes

FORMATS = {  # bits, zero, levels, offsets, step
    "w2_matmul": {"int2a-g32": (2, 0, False, True, 32), "ternary-g128": (2, 1, False, False, 64)},
    "w4_matmul": {
        "int4a-g32": (4, 0, False, True, 32), "int4-g128": (4, 8, False, False, 64),
        "nf4-g64": (4, 0, True, False, 64),
    },
    "w8_matmul": {"int8-g32": (8, 0, False, False, 32), "int8-row": (8, 0, False, False, 64)},
}  # fmt: skip


def configs(target: Target, step: int, bits: int, swiglu: bool, space=_weight_only.SPACE) -> list:
    """Those for many rows and for few, whose sums are split, with their names."""
    of = (step, bits, swiglu, space)
    found = {str(c): c for rows in (128, _weight_only.SPLIT_ROWS) for c in _weight_only.pruned(target, rows, *of)}
    named = []
    for config in found.values():
        rows, columns, splits = (config.kwargs[key] for key in ("BLOCK_M", "BLOCK_N", "SPLITS"))
        split = f" split {splits}" if splits > 1 else ""
        named.append((f"{rows}x{' swiglu ' if swiglu else ''}{columns}{split}", config))
    return named


def _weight_only_specimens(target: Target) -> Iterator[Specimen]:
    for op, formats in FORMATS.items():
        for format, (bits, zero, levels, offsets, step) in formats.items():
            step = min(step, target.step)
            for dtype in dtypes(target):
                for swiglu in (False, True):
                    for label, config in configs(target, step, bits, swiglu):
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
    for dtype in dtypes(target):
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
            for label, config in configs(target, step, 8, swiglu):
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


def specimens(target: Target) -> Iterator[Specimen]:
    yield from _weight_only_specimens(target)
    yield from _int8_specimens(target)
    yield from _other_specimens(target)
