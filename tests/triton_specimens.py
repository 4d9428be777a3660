"""Every Triton kernel with what it is compiled for: types, constants, and the configurations that a target
has room for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from memlm.kernels import (
    _attention, _rows, _weight_only, attention, attention_backward, dequantize, quantize_rows, w8a8_matmul,
)  # fmt: skip
from memlm.kernels._targets import Target


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
        names = self.kernel.arg_names
        return [leaf for name, kind in self.types.items() for leaf in _leaves(kind, (names.index(name),))]

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


ATTENTION = (
    ("attention", attention.attention_kernel, attention.room),
    ("attention_backward q", attention_backward.grad_q_kernel, attention_backward.q_room),
    ("attention_backward kv", attention_backward.grad_kv_kernel, attention_backward.kv_room),
)


def _attention_specimens(target: Target) -> Iterator[Specimen]:
    """Causal; and with all options at once but packed sequences, which exclude masks."""
    strides = ("i32:16", "i32:16", "i32:16", 1)
    causal = _attention.Rules(**(
        dict.fromkeys(_attention.Rules._fields)
        | dict.fromkeys("heads group q_len k_len sequences left right to_end".split(), "i32")
        | {"scale": "fp32", "kept": "fp32"}
    ))  # fmt: skip
    tensors = "q k v out grad grad_q grad_k grad_v".split()
    for options, dtype in ((False, "fp16"), (True, _dtypes(target)[-1]), (False, "fp32")):
        rules, size, mask_block = causal, 4 if dtype == "fp32" else 2, 128 if options else 0
        if options:
            rules = causal._replace(
                softcap="fp32", slopes="*fp32", mask=f"*{dtype}", mask_strides=strides, block_mask="*u8",
                block_strides=("i32", "i32", "i32", 1), dropped="i32", seed_low="i32", seed_high="i32",
            )  # fmt: skip
        types = {
            **dict.fromkeys(tensors, f"*{dtype}"), **dict.fromkeys((f"{name}_strides" for name in tensors), strides),
            **dict.fromkeys(("lse", "delta", "sinks"), "*fp32"), "grad_mask": "*fp32" if options else None,
            "scale": "fp32", "a": rules, "about": (1, 1, 1),
        }  # fmt: skip
        of = f"{'options' if options else 'causal'} {NAMES[dtype]}"
        for dim, (name, kernel, room) in itertools.product((64, 128, 256), ATTENTION):
            for config in _attention.pruned(target, room, size, options, mask_block, dim, dim):
                own, step = config.kwargs["OWN"], config.kwargs["STEP"]
                yield Specimen(
                    f"{name} {of}", kernel, {key: types[key] for key in kernel.arg_names if key in types},
                    {"dim": dim, "v_dim": dim, "DIM": dim, "V_DIM": dim, "MASK_BLOCK": mask_block, **config.kwargs},
                    f"{dim} {own}x{step} {config.num_warps} warps", config.num_warps, config.num_stages,
                )  # fmt: skip
        yield Specimen(
            f"attention_backward delta {of}", attention_backward.delta_kernel,
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
    yield from _other_specimens(target)
    yield from _attention_specimens(target)
