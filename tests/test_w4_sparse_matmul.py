"""w4_sparse_matmul: every implementation, instruction set and pattern against f64 and the dense
kernel, and as a torch op."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import matmul_checks
from .matmul_checks import random_case
from .sparse_checks import Sparse, assert_op_refuses, before_unreadable_memory

OP = "w4_sparse_matmul"


class TestW4SparseMatmul(Sparse):
    OP = OP
    FORMATS = ["2:4/int4-g32", "2:4/nf4-g64", "unstructured/int4-g128", "unstructured/nf4-g32"]
    SOME = ["2:4/nf4-g64", "unstructured/int4-g32"]
    INTEGERS = ["2:4/int4-g32", "unstructured/int4-g64"]

    def test_numbers(self, some, fast):
        super().test_numbers(some, fast)
        matmul_checks.check_not_finite(OP, some, fast)

    def test_bad_input(self, some):
        check_bad_input(some)


def check_bad_input(name: str):
    x, packed, bias = random_case(name, 20, 96, 6, torch.float32)
    unstructured = packed.format.pattern == "unstructured"

    def refused(match, x=x, **changes):
        assert_op_refuses(OP, packed, match, x, **changes)

    refused("codes: got", codes=packed.codes[:1])
    refused("codes: got", codes=packed.codes.to(torch.int8))
    refused("places: got", places=packed.places[:1])
    refused("places: got", places=packed.places.to(torch.int8))
    refused("scales: got", scales=packed.scales[:, :1])
    refused("scales: got", scales=packed.scales.double())
    refused("codes: got|scales: got", n=33)
    refused("codes: got|scales: got", k=300, x=torch.ones(6, 300))
    refused("group: got 48", group=48)
    refused("pattern: got", pattern=3)
    refused("shape: got n=0", n=0)
    refused(r"x: got shape \[6, 95\]", x=x[:, :95])
    refused("x: got torch.float64", x=x.double())
    if not unstructured:
        refused("got tensors", starts=torch.zeros(3, dtype=torch.int64))
        return
    starts, codes = packed.starts, packed.codes
    refused("got tensors", starts=None)
    for at, value in [(0, 1), (0, -1), (1, -1), (1, 2**62), (2, 0), (2, len(codes))]:
        bad = starts.clone()
        bad[at] = value
        refused("starts: must be", starts=bad)
    refused("codes: got", codes=codes[:-1])
    refused("codes: got", codes=codes[:63])
    refused("codes: got", codes=torch.cat((codes, codes)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["2:4/int4-g32", "unstructured/int4-g32"]), st.data())
def test_whatever_places_say_nothing_else_is_read(name, data):
    """Changed places and starts: the op refuses them or multiplies with something, but reads
    nothing behind its tensors."""
    packed = random_case(name, 40, 100, 3, torch.float32)[1]
    parts = {key: before_unreadable_memory(t) for key, t in packed.tensors().items()}
    if data.draw(st.booleans()):
        parts["places"].fill_(data.draw(st.sampled_from([0, 255])))
    for _ in range(data.draw(st.integers(1, 3))):
        raw = parts[data.draw(st.sampled_from([n for n in parts if n in ("starts", "places")]))]
        raw = raw.view(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    weights = (
        parts["codes"], parts["places"], parts.get("starts"), parts["scales"],
        1 if name.startswith("2:4") else 2, 0, 40, 100, 32,
    )  # fmt: skip
    for m in (1, 33):
        for fast in (True, False):
            x, rest = torch.ones(m, 100), (None, fast, None, 0.0, False, None)
            try:
                assert getattr(torch.ops.memlm, OP)(x, *weights, *rest).shape == (m, 40)
            except RuntimeError:
                assert "starts" in parts
