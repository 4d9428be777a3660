"""Rows quantised and expanded, weights quantised, and what matmul_topk has beside its product."""

from __future__ import annotations

from collections.abc import Iterator

from memlm.kernels import dequantize, matmul_topk, quantize_rows, quantize_weight
from memlm.kernels._targets import Target

from .specimen import NAMES, Specimen, dtypes


def _row_specimens(target: Target) -> Iterator[Specimen]:
    for dtype in dtypes(target):
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


def _top_and_weight_specimens(target: Target) -> Iterator[Specimen]:
    """What is left of matmul_topk, whose product is that of others, and quantize_weight."""
    for top in (64, matmul_topk.MOST_TOP):
        yield Specimen(
            f"topk_chunk {top}", matmul_topk.chunk_kernel, {"logits": "*fp32", "keys": "*i64"},
            {"CHUNK": matmul_topk.CHUNK, "TOP": top}, warps=8, divisible=("features",),
        )  # fmt: skip
        yield Specimen(
            f"topk_row {top}", matmul_topk.row_kernel, {"keys": "*i64", "values": "*fp32", "indices": "*i64"},
            {"LAST": True, "TOP": top},
        )  # fmt: skip
    numbers = {"ZERO": 0, "LEVELS": False, "OFFSETS": False, "WHOLE": False}
    for name, constants in {
        "int8-row": {"BITS": 8, "FIRST": -127.0, "LAST": 127.0, "WHOLE": True},
        "int4-g32": {"BITS": 4, "FIRST": -8.0, "LAST": 7.0, "ZERO": 8},
        "int4a-g32": {"BITS": 4, "FIRST": 0.0, "LAST": 15.0, "OFFSETS": True},
        "nf4-g64": {"BITS": 4, "FIRST": -8.0, "LAST": 7.0, "LEVELS": True},
    }.items():
        yield Specimen(
            f"quantize_weight {name} f16", quantize_weight.quantize_kernel,
            {
                "w": "*fp16", "words": "*i32", "scales": "*fp16", "offsets": "*fp16", "largest": "*fp32",
                "tables": "*fp32",
            },
            {**numbers, **constants, "LANES": quantize_weight.LANES},
            divisible=("rows", "padded_rows", "k", "span"),
        )  # fmt: skip


def specimens(target: Target) -> Iterator[Specimen]:
    yield from _row_specimens(target)
    yield from _top_and_weight_specimens(target)
