"""All layers in one call: what it refuses, leaving everything as it was."""

import copy

import pytest
import torch

import memlm
from memlm.layers.native import NativeLayers
from memlm.models.decoder import Decoder

from . import tiny


@pytest.fixture
def model(tmp_path) -> Decoder:
    tiny.llama(tmp_path)
    return memlm.quantize_(memlm.load(tmp_path), memlm.QuantConfig("int4", "int8", "int8"))


def parts_of(model, **changes):
    """Of all layers; the first one changed."""
    first, *others = (layer.parts() for layer in model.layers)
    return [first._replace(**changes), *others]


def resized(linear, n, k):
    """Another layer in its place, ``[n, k]``."""
    return memlm.layers.Linear(memlm.quantize_weight(torch.ones(n, k), linear.format))


REFUSED_AT_ONCE = {
    "dtypes": (lambda m: {"post_norm": torch.ones(64).half()}, "norms and biases are of several dtypes"),
    "bias": (
        lambda m: {"o": memlm.layers.Linear(m.layers[0].attention.o_proj.packed, torch.ones(64).bfloat16())},
        "norms and biases are of several dtypes",
    ),
    "order": (
        lambda m: {"o": memlm.layers.Linear(m.layers[0].attention.o_proj.packed, order=torch.arange(64).int())},
        "an order of their own",
    ),
    "device": (lambda m: {"o": copy.deepcopy(m.layers[0].attention.o_proj).to("meta")}, "not on the CPU"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED_AT_ONCE.values(), ids=REFUSED_AT_ONCE)
def test_layers_that_are_refused_at_once(model, change, message):
    with pytest.raises(ValueError, match=f"layers: .*{message}"):
        NativeLayers(parts_of(model, **change(model)))


# What is wrong with the layers of a call -> what it says.
WRONG = {
    "qkv": (lambda p: {"qkv": resized(p.qkv, 96, 64)}, r"layers\[0\].qkv: is \[96, 64\], expected \[128, 64\]"),
    "o": (lambda p: {"o": resized(p.o, 48, 64)}, r"layers\[0\].qkv: is \[128, 64\], expected \[128, 48\]"),
    "gate_up": (lambda p: {"gate_up": resized(p.gate_up, 80, 64)}, r"layers\[0\].gate_up: has 80 rows"),
    "gate_up k": (lambda p: {"gate_up": resized(p.gate_up, 224, 60)}, r"layers\[0\].gate_up: is"),
    "down": (lambda p: {"down": resized(p.down, 64, 128)}, r"layers\[0\].down: is \[64, 128\], expected \[64, 112\]"),
    "window": (lambda p: {"window": -1}, r"layers\[0\].window: got -1"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_layers_that_do_not_fit_together(model, change, message):
    parts = parts_of(model)
    parts[0] = parts[0]._replace(**change(parts[0]))
    refused(model, NativeLayers(parts), message)


def refused(model, layers, message, hidden=None, **changes):
    """A step of two sequences raises ValueError; x, the pools and the sequences stay what they are."""
    cache = changes.pop("cache", None) or model.new_cache("f32")
    step = cache.begin_step({cache.add(): 3, cache.add(): 40})
    x = changes.pop("x", None)
    x = torch.randn(43, hidden or layers.hidden) if x is None else x
    angles = changes.pop("angles", None)
    angles = model.rotary.table(64, x.device) if angles is None else angles
    before = [pool.clone() for pool in cache.pools], x.clone()
    with pytest.raises(ValueError, match=message):
        layers.run(x, cache, step, angles)
    assert all(torch.equal(a, b) for a, b in zip(cache.pools, before[0])) and torch.equal(x, before[1])


def test_arguments_that_do_not_fit(model):
    layers = NativeLayers(parts_of(model))
    refused(model, layers, r"x: got torch.float32 \[42, 64\], expected torch.float32 \[43, 64\]", x=torch.ones(42, 64))
    refused(model, layers, "x: got torch.bfloat16", x=torch.ones(43, 64).bfloat16())
    refused(model, layers, r"positions: got 39 for row 42, there are 39 angles", angles=torch.ones(39, 3, 8))
    c = model.config
    for layers_, heads, dim, message in (
        (3, c.kv_heads, c.head_dim, "cache: has 3 layers, there are 2"),
        (2, 3, c.head_dim, "heads: got 4, accepted are multiples of the pool's 3"),
        (2, 4, c.head_dim, r"layers\[0\].qkv: is \[128, 64\], expected \[192, 64\]"),
        (2, 4, 15, "head_dim: got 15, accepted are even ones"),
    ):  # fmt: skip
        refused(model, layers, message, cache=memlm.PagedKVCache(layers_, heads, dim, "f32"))
