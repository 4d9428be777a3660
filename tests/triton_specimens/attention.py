"""Attention and its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from memlm.kernels import _attention, attention, attention_backward
from memlm.kernels._targets import Target

from .specimen import NAMES, Specimen, dtypes

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
    last = dtypes(target)[-1]
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
    yield from _attention_specimens(target)
