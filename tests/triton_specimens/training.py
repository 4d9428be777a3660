"""The optimizer, and the loss."""

from __future__ import annotations

from collections.abc import Iterator

from memlm.kernels import adamw_8bit, linear_cross_entropy, linear_cross_entropy_backward
from memlm.kernels._targets import Target

from .specimen import NAMES, Specimen, dtypes


def _training_specimens(target: Target) -> Iterator[Specimen]:
    for dtype in ("fp32", *dtypes(target)):
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
    for dtype in dtypes(target):
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
    yield from _training_specimens(target)
    yield from _cross_entropy_specimens(target)
