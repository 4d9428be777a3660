"""Sparse matrices."""

from __future__ import annotations

from collections.abc import Iterator

from memlm.kernels import (
    block_sparse_grad_values, block_sparse_grad_x, block_sparse_matmul, w4_sparse_dequantize,
    w4_sparse_matmul,
)  # fmt: skip
from memlm.kernels._targets import Target

from .matmul import configs
from .specimen import NAMES, Specimen, dtypes

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
        kinds += [(dtype, True) for dtype in dtypes(target)]
    for dtype, swiglu in kinds:
        for label, config in configs(target, 32, 4, False, space):
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
    yield from _block_specimens(target)
    yield from _compressed_specimens(target)
    yield from _gradient_specimens()
