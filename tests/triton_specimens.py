"""Every Triton kernel with what it is compiled for: types, constants, and the configurations that a target
has room for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton.language as tl

from memlm.kernels import (
    _attention, _kv, _rows, _weight_only, adamw_8bit, attention, attention_backward, block_sparse_grad_values,
    block_sparse_grad_x, block_sparse_matmul, dequantize, kv_append, linear_cross_entropy,
    linear_cross_entropy_backward, matmul_topk, paged_attention, quantize_rows, quantize_weight,
    w4_sparse_dequantize, w4_sparse_matmul, w8a8_matmul,
)  # fmt: skip
from memlm.kernels._targets import Target
from memlm.kv_formats import KvFormat


@dataclass(frozen=True)
class Specimen:
    name: str
    kernel: object
    # Of pointers and tuples; other arguments are 32-bit integers unless constants.  "i32:16" are multiples of 16,
    # None and numbers stand for themselves.
    types: dict[str, object]
    constants: dict = field(default_factory=dict)
    config: str = ""
    warps: int = 4
    stages: int = 3
    divisible: tuple[str, ...] = ()  # integers that are multiples of 16

    @property
    def signature(self) -> dict[str, object]:
        kinds = {name: "constexpr" for name in self.constants} | self.types
        return {name: _signature(kinds.get(name, "i32")) for name in self.kernel.arg_names}

    def _leaves(self) -> list[tuple[tuple[int, ...], object]]:
        names = enumerate(self.kernel.arg_names)
        return [leaf for i, name in names if name in self.types for leaf in _leaves(self.types[name], (i,))]

    @property
    def constexprs(self) -> dict[tuple[int, ...], object]:
        """By place among the arguments, and within them."""
        named = {(self.kernel.arg_names.index(name),): value for name, value in self.constants.items()}
        return named | {path: kind for path, kind in self._leaves() if not isinstance(kind, str)}

    @property
    def aligned(self) -> list[tuple[int, ...]]:
        """Places of pointers, and of integers that are multiples of 16."""
        named = [(self.kernel.arg_names.index(name),) for name in self.divisible]
        of_types = [path for path, kind in self._leaves() if isinstance(kind, str) and (kind[0] == "*" or ":" in kind)]
        return named + of_types


def _leaves(kind, path: tuple[int, ...]) -> list[tuple[tuple[int, ...], object]]:
    if isinstance(kind, tuple):
        return [leaf for i, part in enumerate(kind) for leaf in _leaves(part, (*path, i))]
    return [(path, kind)]


def _signature(kind):
    """As Triton writes it."""
    if isinstance(kind, tuple):
        parts = [_signature(part) for part in kind]
        return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)
    return kind.split(":")[0] if isinstance(kind, str) else "constexpr"


FORMATS = {  # bits, zero, levels, offsets, step
    "w2_matmul": {"int2a-g32": (2, 0, False, True, 32), "ternary-g128": (2, 1, False, False, 64)},
    "w4_matmul": {
        "int4a-g32": (4, 0, False, True, 32), "int4-g128": (4, 8, False, False, 64),
        "nf4-g64": (4, 0, True, False, 64),
    },
    "w8_matmul": {"int8-g32": (8, 0, False, False, 32), "int8-row": (8, 0, False, False, 64)},
}  # fmt: skip
NAMES = {"fp16": "f16", "bf16": "bf16", "fp32": "f32"}


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
            for dtype in _dtypes(target):
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


ATTENTION = (
    ("attention", attention.attention_kernel, attention.room, _attention.SPACE),
    ("attention_backward q", attention_backward.grad_q_kernel, attention_backward.q_room, _attention.SPACE),
    (
        "attention_backward kv", attention_backward.grad_kv_kernel, attention_backward.kv_room,
        attention_backward.KV_SPACE,
    ),
)  # fmt: skip


def _attention_specimens(target: Target) -> Iterator[Specimen]:
    """Causal; with all options at once but packed sequences, which exclude masks; and where all numbers are 1, which
    are constants to Triton."""
    strides, pieces = ("i32:16", "i32:16", "i32:16", 1), ("i32", "i32", "i32", 1)
    numbers = "heads group q_len k_len sequences left right to_end".split()
    nothing = dict.fromkeys(_attention.Rules._fields) | {"scale": "fp32", "kept": "fp32"}
    causal = _attention.Rules(**nothing | dict.fromkeys(numbers, "i32"))
    drops = dict.fromkeys(("dropped", "seed_low", "seed_high"), "i32")
    ones = causal._replace(**dict.fromkeys([*numbers, *drops], 1))
    last = _dtypes(target)[-1]
    options = causal._replace(
        softcap="fp32", slopes="*fp32", mask=f"*{last}", mask_strides=strides, block_mask="*u8", block_strides=pieces,
        **drops,
    )  # fmt: skip
    tensors = "q k v out grad grad_q grad_k grad_v".split()
    for kind, dtype, rules in (
        ("causal", "fp16", causal), ("options", last, options), ("causal", "fp32", causal), ("ones", "fp16", ones),
    ):  # fmt: skip
        size, mask_block = 4 if dtype == "fp32" else 2, 128 if rules.block_mask else 0
        types = {
            **dict.fromkeys(tensors, f"*{dtype}"), **dict.fromkeys((f"{name}_strides" for name in tensors), strides),
            **dict.fromkeys(("lse", "delta", "sinks"), "*fp32"), "grad_mask": "*fp32" if rules.mask else None,
            "scale": "fp32", "a": rules, "about": (1, 1, 1),
        }  # fmt: skip
        dims = (64,) if rules is ones else (64, 128, 256)
        for dim, (name, kernel, room, space) in itertools.product(dims, ATTENTION):
            found = _attention.pruned(space, target, room, size, rules is options, mask_block, dim, dim)
            for config in found[:1] if rules is ones else found:
                own, step = config.kwargs["OWN"], config.kwargs["STEP"]
                yield Specimen(
                    f"{name} {kind} {NAMES[dtype]}", kernel,
                    {key: types[key] for key in kernel.arg_names if key in types},
                    {"dim": dim, "v_dim": dim, "DIM": dim, "V_DIM": dim, "MASK_BLOCK": mask_block, **config.kwargs},
                    f"{dim} {own}x{step} {config.num_warps} warps", config.num_warps, config.num_stages,
                )  # fmt: skip
        yield Specimen(
            f"attention_backward delta {kind} {NAMES[dtype]}", attention_backward.delta_kernel,
            {key: types[key] for key in ("grad", "out", "delta", "grad_strides", "out_strides")},
            {"v_dim": 128, "V_DIM": 128, "OWN": attention_backward.DELTA_ROWS},
        )  # fmt: skip
    yield Specimen(
        "attention_backward sinks", attention_backward.grad_sinks_kernel,
        dict.fromkeys(("sinks", "lse", "delta", "grad_sinks"), "*fp32"), {"BLOCK": attention_backward.SINKS_BLOCK},
    )  # fmt: skip


def specimens(target: Target) -> Iterator[Specimen]:
    yield from _weight_only_specimens(target)
    yield from _int8_specimens(target)
    yield from _row_specimens(target)
    yield from _block_specimens(target)
    yield from _compressed_specimens(target)
    yield from _gradient_specimens()
    yield from _other_specimens(target)
    yield from _top_and_weight_specimens(target)
    yield from _kv_specimens(target)
    yield from _training_specimens(target)
    yield from _attention_specimens(target)
    yield from _cross_entropy_specimens(target)
