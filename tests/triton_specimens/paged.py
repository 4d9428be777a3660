"""The paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl

from memlm.kernels import _kv, kv_append, paged_attention
from memlm.kernels._targets import Target
from memlm.kv_formats import KvFormat

from .specimen import NAMES, Specimen, dtypes


def _kv_specimens(target: Target) -> Iterator[Specimen]:
    for type, sizes in {"f32": (64, 128), "bf16": (80, 128), "int8": (128,), "int4": (64, 128, 256)}.items():
        for dim in sizes:
            format = KvFormat(type, 64, dim)
            number = {"f32": "*fp32", "bf16": "*bf16"}.get(type)
            arrays = {
                "pool": number, "scales": "*fp16", "tails": "*bf16", "rows": "*i64", "lengths": "*i64",
                "tables": "*i32", "tail_of": "*i32",
            }  # fmt: skip
            layout = {"F": _kv.layout_of(format), "TAIL": format.tail and _kv.layout_of(format.tail)}
            for dtype in dtypes(target):
                yield Specimen(
                    f"kv_append {type} {NAMES[dtype]}", kv_append.kv_append_kernel,
                    arrays | dict.fromkeys(("k", "v", "q", "turned"), f"*{dtype}")
                    | {"pool": number or "*u8", "cos": "*fp32", "sin": "*fp32", "positions": "*i64"},
                    layout | {
                        "CHANNELS": kv_append.channels_of(format), "ROPE": True, "POSITIONS": True, "GROUP": 4,
                    },
                    str(dim), kv_append.warps_of(format), 3,
                    ("k_stride", "v_stride", "q_stride", "turned_stride", "angle_stride"),
                )  # fmt: skip
                if dtype == "bf16" and (type != "bf16" or dim != 128):
                    continue  # it needs fewer parts of numbers than f16
                yield from _paged_attention_specimens(target, f"{type} {NAMES[dtype]}", dtype, dim, layout, {
                    **arrays, "pool": number or "*i32", "q": f"*{dtype}", "out": f"*{dtype}",
                    **dict.fromkeys(("slopes", "sinks", "sums_of", "most_of", "total_of"), "*fp32"),
                    "scale": "fp32", "softcap": "fp32",
                })  # fmt: skip


def _paged_attention_specimens(target, name, dtype, dim, layout, types) -> Iterator[Specimen]:
    f, math = layout["F"], paged_attention.math_of(target)
    queries, weights = paged_attention.parts_of(f, torch.float16 if dtype == "fp16" else torch.bfloat16, math)
    flags = {"GROUP": 4, "WINDOW": True, "SINKS": True, "SLOTS_ARE_ROWS": False}
    for config in paged_attention.pruned(target, f, 128, queries):
        yield Specimen(
            f"paged_attention {name}", paged_attention.paged_attention_kernel, types,
            layout | flags | {
                "SOFTCAP": True, "SLOPES": True, "SPLIT": True, "QUERY_PARTS": queries, "WEIGHT_PARTS": weights,
                "MATH": tl.float32 if math == torch.float32 else tl.bfloat16,
                **config.kwargs,
            },
            f"{dim} {config.kwargs['BLOCK_M']} rows {config.num_warps} warps {config.num_stages} stages",
            config.num_warps, config.num_stages, ("q_stride",),
        )  # fmt: skip
    kernel = paged_attention.combine_kernel
    used = {key: kind for key, kind in types.items() if key in kernel.arg_names}
    yield Specimen(f"paged_attention_combine {name}", kernel, used, {"F": f, "HEADS": 4, **flags}, str(dim))


def specimens(target: Target) -> Iterator[Specimen]:
    yield from _kv_specimens(target)
