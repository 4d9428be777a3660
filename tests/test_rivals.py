"""The benchmarks' rivals compute what they should, where they are installed."""

import copy
import importlib

import pytest
import torch

from benchmarks import harness, rivals


@pytest.mark.parametrize("bits, rounding", [(4, 0.05), (8, 0.003)])
@pytest.mark.parametrize("library", rivals.LIBRARIES)
def test_candidates(library, bits, rounding):
    try:
        found = importlib.import_module(f"benchmarks.rivals.{library}").candidates(bits)
    except ImportError as error:
        pytest.skip(f"{library}: {error}")
    assert found or (library, bits) == ("bitsandbytes", 8)
    torch.manual_seed(0)
    w = torch.randn(96, 256)
    for candidate in found:
        prepared = candidate.prepare(w)
        size = harness.stored_bytes(prepared)
        assert bits / 8 < size / w.numel() < 1.26 * bits / 8, candidate.impl
        for m in (1, 5):
            x = torch.randn(m, 256)
            exact = x.double() @ w.double().T
            x = x.to(candidate.dtype)
            stored = copy.deepcopy(prepared)
            result = candidate.run(x, stored).clone()
            error = (result.double() - exact).norm() / exact.norm()
            assert rounding < error < harness.ROUNDING[bits], candidate.impl
            assert torch.equal(candidate.run(x, stored), result), candidate.impl
            assert candidate.version.split()[-1]


def test_a_library_that_is_not_installed_is_left_out(capsys):
    assert rivals.candidates(4, ("no_such_library",)) == []
    assert "no_such_library: left out" in capsys.readouterr().err


def test_rounding_is_that_of_memlm():
    w = torch.randn(3, 64)
    codes, scales = rivals.rounded(w, "int4-g32")
    assert codes.shape == (3, 64) and scales.shape == (3, 2)
    back = (codes.float() - 8) * scales.repeat_interleave(32, 1)
    assert 0.05 < (back - w).norm() / w.norm() < 0.2
    low_and_high = rivals.pairs(codes)
    assert torch.equal(low_and_high & 15, codes[:, ::2])
    assert torch.equal(low_and_high >> 4, codes[:, 1::2])
    with pytest.raises(RuntimeError, match="k: got 40, a multiple of 32 is needed"):
        rivals.rounded(torch.randn(3, 40), "int4-g32")
