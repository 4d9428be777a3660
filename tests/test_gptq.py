"""GPTQ folders against literal bytes and the published layout in Python's integers, and files that
lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm import formats
from memlm.formats import Format
from memlm.io import safetensors

from . import tiny
from .quantized import (
    assert_dequantised,
    assert_exact,
    assert_refused,
    offsets_round,
    open_folder,
    read_mutated,
)


def config(bits=4, group=32, **changes):
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False,
        "damp_percent": 0.01, "checkpoint_format": "gptq", **changes,
    }  # fmt: skip


def words(values: list[int], bits: int) -> list[int]:
    """int32 words, the first value in the lowest bits; one at a time."""
    per_word = 32 // bits
    assert len(values) % per_word == 0
    out = []
    for start in range(0, len(values), per_word):
        word = sum(v << i * bits for i, v in enumerate(values[start : start + per_word]))
        out.append(word - 2**32 if word >= 2**31 else word)
    return out


def stored(bits, codes, scales, zeros, g_idx=None, less=1, name="m"):
    """codes [n, k], scales and zeros [n, groups] as AutoGPTQ's ``pack`` stores them."""
    qweight = [words(row, bits) for row in codes.tolist()]  # along k
    qzeros = [words([z - less for z in column], bits) for column in zeros.T.tolist()]  # along n
    tensors = {
        f"{name}.qweight": torch.tensor(qweight, dtype=torch.int32).T,
        f"{name}.qzeros": torch.tensor(qzeros, dtype=torch.int32),
        f"{name}.scales": scales.T,
    }
    return tensors if g_idx is None else {**tensors, f"{name}.g_idx": g_idx.int()}


def matrix(bits, n, k, groups, less=1, dtype=torch.float16):
    g = torch.Generator().manual_seed(n * k)
    codes = torch.randint(1 << bits, (n, k), generator=g)
    scales = (torch.rand(n, groups, generator=g) / 100).to(dtype)
    zeros = torch.randint(1 << bits, (n, groups), generator=g) + less
    return codes, scales, zeros


# --- what is read --------------------------------------------------------------------------------


def test_golden_bytes(tmp_path):
    """n = k = 8: row i has code i + j (of 16) in column j; zero points 1 ... 8, stored less 1."""
    columns = [0x76543210, 0x87654321, 0x98765432, 0xA9876543, 0xBA987654, 0xCBA98765,
               0xDCBA9876, 0xEDCBA987]  # fmt: skip
    qweight = [[c - 2**32 if c >= 2**31 else c for c in columns]]
    tensors = {
        "m.qweight": torch.tensor(qweight, dtype=torch.int32),
        "m.qzeros": torch.tensor([[0x76543210]], dtype=torch.int32),
        "m.scales": torch.full((1, 8), 0.5).half(),
        "m.bias": torch.zeros(8).half(),
        "m.g_idx": torch.zeros(8).int(),
    }
    folder = open_folder(tmp_path, config(group=-1), tensors)
    assert sorted(folder.names()) == ["m.bias", "m.weight"]
    wanted = [[(i + j - (i + 1)) * 0.5 for j in range(8)] for i in range(8)]
    assert folder.tensor("m.weight").tolist() == wanted
    result = folder.packed("m.weight")
    assert result.order is None and result.packed.format == Format(4, 128, symmetric=False)
    assert formats.dequantize(result.packed).tolist() == wanted


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "bits, group, n, k",
    [(4, 32, 40, 160), (4, 128, 8, 256), (4, -1, 24, 72), (4, 64, 16, 136), (4, 256, 16, 520),
     (4, 16, 8, 64), (2, 32, 16, 64), (2, 64, 48, 208), (8, 32, 4, 68)],
)  # fmt: skip
def test_the_published_layout(tmp_path, bits, group, n, k, dtype, version):
    """Zero points from 1 to 2 ** bits (first version) or 0 to 2 ** bits - 1 (second)."""
    less = 0 if version == "gptq_v2" else 1
    span = min(group, k) if group > 0 else k
    codes, scales, zeros = matrix(bits, n, k, -(-k // span), less, dtype)
    key = "format" if version == "gptq_v2" else "checkpoint_format"
    rules = config(bits, group, checkpoint_format=None)
    folder = open_folder(
        tmp_path, {**rules, key: version}, stored(bits, codes, scales, zeros, less=less)
    )
    g_idx = torch.arange(k) // span
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)
    if group == 16 or bits == 8 or offsets_round(scales, zeros):
        assert folder.packed("m.weight") is None
    else:
        assert_exact(folder.packed("m.weight"), codes, scales, zeros, g_idx)


@pytest.mark.parametrize("bits, zero, format", [
    (4, 8, Format(4, 32)), (8, 128, Format(8, 32)), (2, 2, Format(2, 32, symmetric=False)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_symmetric(tmp_path, bits, zero, format, dtype):
    codes, scales, zeros = matrix(bits, 16, 96, 3, dtype=dtype)
    zeros[:] = zero
    folder = open_folder(tmp_path, config(bits, sym=True), stored(bits, codes, scales, zeros))
    result = folder.packed("m.weight")
    assert result.packed.format == format and result.packed.scales.dtype == dtype
    assert_exact(result, codes, scales, zeros, torch.arange(96) // 32)


@pytest.mark.parametrize("bits, group, k", [(4, 32, 160), (4, 64, 136), (8, 128, 384), (2, 32, 96)])
def test_activation_order(tmp_path, monkeypatch, bits, group, k):
    monkeypatch.setattr("memlm.io.quantized._CHUNK", 1)  # 16 rows at a time
    codes, scales, zeros = matrix(bits, 48, k, -(-k // group))
    if bits == 8:
        zeros[:] = 128
    g_idx = (torch.arange(k) // group)[torch.randperm(k, generator=torch.manual_seed(1))]
    tensors = stored(bits, codes, scales, zeros, g_idx)
    folder = open_folder(tmp_path, config(bits, group, desc_act=True), tensors)
    result = folder.packed("m.weight")
    assert result.order is not None
    assert_exact(result, codes, scales, zeros, g_idx)
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)
    # The product as a layer forms it: column j multiplies x[order[j]].
    x = torch.randint(-9, 10, (k,), generator=torch.manual_seed(3)).double()
    w = (codes - zeros[:, g_idx]).double() * scales.double()[:, g_idx]
    y = formats.dequantize(result.packed, torch.float64) @ x[result.order]
    assert torch.allclose(y, w @ x, rtol=1e-12)


def test_groups_in_order_need_no_order(tmp_path):
    codes, scales, zeros = matrix(4, 8, 96, 3)
    g_idx = torch.arange(96) // 32
    folder = open_folder(
        tmp_path, config(desc_act=True), stored(4, codes, scales, zeros, g_idx)
    )
    assert folder.packed("m.weight").order is None
    assert_exact(folder.packed("m.weight"), codes, scales, zeros, g_idx)


def test_groups_of_unequal_sizes_are_not_packed(tmp_path):
    codes, scales, zeros = matrix(4, 8, 96, 3)
    g_idx = torch.tensor([2] * 33 + [0] * 31 + [1] * 32)
    folder = open_folder(tmp_path, config(), stored(4, codes, scales, zeros, g_idx))
    assert folder.packed("m.weight") is None
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)


def test_settings_of_single_modules(tmp_path):
    """``dynamic``: of another number of bits, another group, or left alone."""
    rules = config(dynamic={"-:.*norm": {}, r"+:.*\.b": {"bits": 2}, "c": {"group_size": 64}})
    parts = {"a": (4, 32), "b": (2, 32), "c": (4, 64)}
    made = {name: matrix(bits, 16, 128, 128 // group) for name, (bits, group) in parts.items()}
    tensors = {"norm.weight": torch.ones(128)}
    for name, (bits, _) in parts.items():
        tensors |= stored(bits, *made[name], name=name)
    folder = open_folder(tmp_path, rules, tensors)
    for name, (_, group) in parts.items():
        assert_exact(folder.packed(f"{name}.weight"), *made[name], torch.arange(128) // group)
    assert folder.packed("norm.weight") is None


@pytest.mark.parametrize("same_order", [True, False])
def test_a_model_computes_with_the_codes(tmp_path, same_order):
    """A llama, columns ordered by activation: query, key and value alike or each its own way."""
    from memlm.streaming import quantize_files

    source, target = tmp_path / "gptq", tmp_path / "packed"
    model = tiny.llama(source, intermediate_size=128)
    tensors, plain = {}, {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        plain[name] = tensor
        if "proj" in name:
            n, k = tensor.shape
            codes, scales, zeros = matrix(4, n, k, k // 32)
            scales = scales / k**0.5 * 40
            seed = k if same_order else i
            g_idx = (torch.arange(k) // 32)[torch.randperm(k, generator=torch.manual_seed(seed))]
            module = name.removesuffix(".weight")
            tensors |= stored(4, codes, scales, zeros, g_idx, name=module)
            plain[name] = (codes - zeros[:, g_idx]).float() * scales.float()[:, g_idx]
        else:
            tensors[name] = tensor
    model.load_state_dict(plain)
    safetensors.write(source / "model.safetensors", tensors, {})
    tiny.edit_config(source, quantization_config=config(desc_act=True))
    ids = torch.randint(256, (2, 30), generator=torch.manual_seed(1))
    wanted, results = tiny.logits(model, ids), []
    quantize_files(source, target)
    for path in (source, target):
        ours = memlm.load(path)
        linears = [m for m in ours.modules() if isinstance(m, memlm.layers.Linear)]
        assert all(m.order is not None for m in linears if m.format == Format(4, 32, False))
        for m in linears:
            m.mode = "accurate"
        if path == source:  # quantize_files rounds the embedding
            with torch.inference_mode():
                torch.testing.assert_close(ours(ids), wanted, rtol=1e-3, atol=1e-4)
        results.append([formats.dequantize(m.packed) for m in linears if m.order is not None])
    assert len(results[0]) == len(results[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [
    ("bits", 3), ("bits", None), ("bits", "4"), ("bits", True), ("bits", 10**30),
    ("group_size", 0), ("group_size", -2), ("group_size", 1e300), ("group_size", None),
    ("desc_act", 1), ("checkpoint_format", "marlin"), ("checkpoint_format", 2),
    ("format", "gptq_v2"), ("is_marlin_format", True), ("pack_dtype", "int16"),
    ("dynamic", [1]), ("dynamic", {"a": 7}), ("dynamic", {"a": {"bits": 5}}),
])  # fmt: skip
def test_configs_that_are_refused(tmp_path, key, value):
    tensors = stored(4, *matrix(4, 8, 64, 2))
    named = "bits" if value == {"a": {"bits": 5}} else key
    with pytest.raises(memlm.FormatError, match=f"quantization_config: .*{named}"):
        open_folder(tmp_path, config(**{key: value}), tensors)


SMALL = stored(4, *matrix(4, 8, 64, 2), g_idx=torch.arange(64) // 32)


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("qweight", None),
        ("qweight", SMALL["m.qweight"].short()),
        ("qweight", SMALL["m.qweight"].flatten()),
        ("qweight", torch.zeros(8, 0, dtype=torch.int32)),
        ("qzeros", None),
        ("qzeros", SMALL["m.qzeros"].float()),
        ("qzeros", torch.zeros(2, 2, dtype=torch.int32)),
        ("qzeros", torch.zeros(3, 1, dtype=torch.int32)),
        ("scales", None),
        ("scales", SMALL["m.scales"].double()),
        ("scales", torch.ones(2, 9).half()),
        ("scales", torch.ones(16).half()),
        ("scales", torch.full((2, 8), float("nan"))),
        ("scales", torch.full((2, 8), float("inf")).half()),
        ("g_idx", None),
        ("g_idx", SMALL["m.g_idx"] + 1),
        ("g_idx", SMALL["m.g_idx"] - 1),
        ("g_idx", SMALL["m.g_idx"][:-1]),
        ("g_idx", SMALL["m.g_idx"].float()),
        ("g_idx", SMALL["m.g_idx"].view(8, 8)),
        ("weight", torch.ones(8, 64)),
        ("wf", torch.ones(8)),
    ],
)
def test_tensors_that_are_refused(tmp_path, name, tensor):
    assert_refused(tmp_path, config(desc_act=True), SMALL, name, tensor)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_folders_are_read_or_raise_format_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated-gptq"
    open_folder(path, config(), SMALL)
    read_mutated(path, data)
