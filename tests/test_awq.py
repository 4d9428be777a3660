"""AWQ folders against literal bytes and the published layout in Python's integers, and files that
lie."""

import pytest
import torch

import memlm
from memlm import formats
from memlm.formats import Format

from .quantized import (
    assert_dequantised,
    assert_exact,
    assert_refused,
    offsets_round,
    open_folder,
)


def config(group=32, **changes):
    return {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None, **changes,
    }  # fmt: skip


def words(values: list[int]) -> list[int]:
    """int32 words of eight values along n, one at a time."""
    assert len(values) % 8 == 0
    out = []
    for start in range(0, len(values), 8):
        word = 0
        for place, row in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            word |= values[start + row] << 4 * place
        out.append(word - 2**32 if word >= 2**31 else word)
    return out


def stored(codes, scales, zeros):
    """codes [n, k], scales and zeros [n, groups] as AutoAWQ's WQLinear_GEMM stores them."""
    return {
        "m.qweight": torch.tensor([words(c) for c in codes.T.tolist()], dtype=torch.int32),
        "m.qzeros": torch.tensor([words(c) for c in zeros.T.tolist()], dtype=torch.int32),
        "m.scales": scales.T,
    }


def matrix(n, k, groups, dtype=torch.float16):
    g = torch.Generator().manual_seed(n * k)
    codes = torch.randint(16, (n, k), generator=g)
    scales = (torch.rand(n, groups, generator=g) / 100).to(dtype)
    return codes, scales, torch.randint(16, (n, groups), generator=g)


def test_golden_bytes(tmp_path):
    """n = 8, k = 2: codes 0 ... 7 and 8 ... 15 down the rows, zero points 7 ... 0."""
    tensors = {
        "m.qweight": torch.tensor([[0x75316420], [0xFDB9ECA8 - 2**32]], dtype=torch.int32),
        "m.qzeros": torch.tensor([[0x02461357]], dtype=torch.int32),
        "m.scales": torch.full((1, 8), 0.25).half(),
        "m.bias": torch.zeros(8),
    }
    folder = open_folder(tmp_path, config(), tensors)
    assert sorted(folder.names()) == ["m.bias", "m.weight"]
    wanted = [[(i - (7 - i)) * 0.25, (i + 8 - (7 - i)) * 0.25] for i in range(8)]
    assert folder.tensor("m.weight").tolist() == wanted
    result = folder.packed("m.weight")
    assert result.order is None and result.packed.format == Format(4, 128, symmetric=False)
    assert formats.dequantize(result.packed).tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "group, n, k",
    [(32, 8, 32), (32, 40, 96), (128, 72, 256), (64, 16, 150), (-1, 24, 75), (256, 8, 512),
     (16, 8, 64)],
)  # fmt: skip
def test_the_published_layout(tmp_path, monkeypatch, group, n, k, dtype):
    monkeypatch.setattr("memlm.io.quantized._CHUNK", 1)  # 16 rows at a time
    span = min(group, k) if group > 0 else k
    codes, scales, zeros = matrix(n, k, -(-k // span), dtype)
    folder = open_folder(tmp_path, config(group), stored(codes, scales, zeros))
    g_idx = torch.arange(k) // span
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)
    if group == 16 or offsets_round(scales, zeros):
        assert folder.packed("m.weight") is None
    else:
        assert_exact(folder.packed("m.weight"), codes, scales, zeros, g_idx)


def test_zero_points_in_the_middle_are_symmetric(tmp_path):
    codes, scales, zeros = matrix(16, 64, 2, torch.float32)
    zeros[:] = 8
    folder = open_folder(tmp_path, config(version="GEMM"), stored(codes, scales, zeros))
    assert folder.packed("m.weight").packed.format == Format(4, 32)
    assert_exact(folder.packed("m.weight"), codes, scales, zeros, torch.arange(64) // 32)


@pytest.mark.parametrize("key, value", [
    ("bits", 8), ("bits", None), ("group_size", 0), ("group_size", [128]), ("group_size", None),
    ("version", "gemv"), ("version", 1), ("format", "gemv_fast"), ("checkpoint_format", "marlin"),
    ("backend", "llm-awq"),
])  # fmt: skip
def test_configs_that_are_refused(tmp_path, key, value):
    with pytest.raises(memlm.FormatError, match=f"quantization_config: {key}"):
        open_folder(tmp_path, config(**{key: value}), stored(*matrix(8, 64, 2)))


SMALL = stored(*matrix(8, 64, 2))


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("qweight", None),
        ("qweight", SMALL["m.qweight"].long()),
        ("qweight", SMALL["m.qweight"].flatten()),
        ("qweight", torch.zeros(0, 1, dtype=torch.int32)),
        ("qzeros", None),
        ("qzeros", SMALL["m.qzeros"].float()),
        ("qzeros", torch.zeros(2, 2, dtype=torch.int32)),
        ("qzeros", torch.zeros(1, 1, dtype=torch.int32)),
        ("scales", None),
        ("scales", SMALL["m.scales"].double()),
        ("scales", torch.ones(3, 8).half()),
        ("scales", torch.ones(8, 2).half()),
        ("scales", torch.full((2, 8), float("nan")).half()),
        ("g_idx", torch.zeros(64).int()),
        ("weight", torch.ones(8, 64)),
    ],
)
def test_tensors_that_are_refused(tmp_path, name, tensor):
    assert_refused(tmp_path, config(), SMALL, name, tensor)
