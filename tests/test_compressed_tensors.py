"""compressed-tensors folders against the library of that name and literal bytes, and files that
lie."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm import formats
from memlm.formats import Format
from memlm.io import compressed_tensors
from memlm.io.bits import pack
from memlm.io.checkpoint import PackedTensor, open_checkpoint
from memlm.io.huggingface import Folder
from memlm.io.quantized import open_quantized

from . import tiny
from .quantized import (
    assert_dequantised,
    assert_exact,
    offsets_round,
    open_folder,
    read_mutated,
)


def config(*weights, **changes):
    """A config with one group for each of ``weights``."""
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": w} for i, w in enumerate(weights)}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": groups, "ignore": ["lm_head"],
        **changes,
    }  # fmt: skip


def scheme(bits=4, group=32, symmetric=True, **changes):
    return {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group,
        "strategy": "group" if group else "channel", **changes,
    }  # fmt: skip


def matrix(bits, n, k, groups, symmetric, dtype=torch.float16, seed=0):
    """Codes [n, k] and zero points [n, groups], not negative, and scales."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (n, k), generator=g, dtype=torch.uint8)
    sizes = 2.0 ** torch.randint(-12, 3, (n, 1), generator=g)
    scales = (torch.rand(n, groups, generator=g) * sizes).to(dtype)
    zeros = torch.randint(1 << bits, (n, groups), generator=g, dtype=torch.uint8)
    return codes, scales, torch.full_like(zeros, 1 << bits - 1) if symmetric else zeros


def stored(bits, codes, scales, zeros=None, g_idx=None):
    tensors = {
        "m.weight_packed": pack(codes, bits),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor(codes.shape),
    }
    if zeros is not None:
        tensors["m.weight_zero_point"] = pack(zeros.T, bits).T
    if g_idx is not None:
        tensors["m.weight_g_idx"] = g_idx.int()
    return tensors


# --- what is read --------------------------------------------------------------------------------


def test_golden_bytes(tmp_path):
    """n = 2, k = 9: codes 0, 1, ... 8 and 15, 14, ... 7; zero points 3 and 12."""
    words = [[0x76543210, 8], [0x89ABCDEF - 2**32, 7]]
    tensors = {
        "m.weight_packed": torch.tensor(words, dtype=torch.int32),
        "m.weight_scale": torch.tensor([[0.5], [2.0]]).half(),
        "m.weight_zero_point": torch.tensor([[0xC3]], dtype=torch.int32),
        "m.weight_shape": torch.tensor([2, 9]),
        "m.bias": torch.ones(2),
        "norm.weight": torch.ones(9),
    }
    folder = open_folder(tmp_path, config(scheme(group=None, symmetric=False)), tensors)
    assert sorted(folder.names()) == ["m.bias", "m.weight", "norm.weight"]
    wanted = [[(q - 3) * 0.5 for q in range(9)], [(q - 12) * 2.0 for q in range(15, 6, -1)]]
    assert folder.tensor("m.weight").tolist() == wanted
    result = folder.packed("m.weight")
    assert result.order is None and result.packed.format == Format(4, 128, symmetric=False)
    assert result.packed.scales.dtype == torch.float16
    assert formats.dequantize(result.packed).tolist() == wanted
    assert formats.unpack(result.packed)[2].tolist() == [[-1.5], [-24.0]]
    assert folder.packed("m.bias") is None and folder.tensor("m.bias").tolist() == [1, 1]
    for name in ("m.weight_scale", "m.weights", "x"):
        for read in (folder.tensor, folder.packed):
            with pytest.raises(KeyError):
                read(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "group, symmetric",
    # The zero point of a whole tensor is stored otherwise.
    [*itertools.product([32, 64, 128, 256, 96, 16, None], [True, False]), ("tensor", True)],
)
@pytest.mark.parametrize("bits", [4, 8, 2])
def test_the_librarys_files(tmp_path, bits, group, symmetric, dtype):
    """Compressed by the library; its integers in f64, and its own decompressed weights."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    if group == "tensor":
        args = quantization.QuantizationArgs(num_bits=bits, strategy="tensor")
    else:
        args = quantization.QuantizationArgs(**scheme(bits, group, symmetric))
    n, k = 37, 768
    span = k if group in (None, "tensor") else group
    codes, scales, zeros = matrix(bits, n, k, k // span, symmetric, dtype)
    g_idx, half = torch.arange(k) // span, 1 << bits - 1
    if group == "tensor":
        scales = scales[:1].expand(n, 1)
    # What these scales and zero points quantise to these codes (in f64, so that nothing moves).
    w = (codes.double() - zeros.double()[:, g_idx]) * scales.double()[:, g_idx]
    state = {"weight": w, "weight_scale": scales[0] if group == "tensor" else scales}
    if not symmetric:
        state["weight_zero_point"] = (zeros.int() - half).to(torch.int8)
    rules = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.PackedQuantizationCompressor
    state = compressor.compress(state, rules)
    entry = json.loads(rules.model_dump_json())
    folder = open_folder(
        tmp_path,
        config(config_groups={"group_0": entry}),
        {f"m.{name}": tensor for name, tensor in state.items()},
    )
    tensor, result = folder.tensor("m.weight"), folder.packed("m.weight")
    assert torch.equal(tensor.to(dtype), compressor.decompress(state, rules)["weight"])
    assert_dequantised(tensor, codes, scales, zeros, g_idx)
    if group == 16 or offsets_round(scales, zeros) or (bits == 8 and not symmetric):
        assert result is None
        return
    packed = result.packed
    assert_exact(result, codes, scales, zeros, g_idx)
    assert packed.format.symmetric == (symmetric and bits != 2)  # the middle of 0..3 is 2
    row = 0 if bits == 8 else 128
    assert packed.format.group == {256: 128, 96: 32, None: row, "tensor": row}.get(group, group)
    assert packed.scales.dtype == torch.float16 or not (dtype == torch.float16 and symmetric)


@pytest.mark.parametrize(
    "bits, group, n, k",
    [(4, 32, 1, 1), (4, 32, 17, 45), (4, None, 33, 101), (4, 128, 5, 130), (8, None, 3, 77),
     (8, 64, 16, 65), (2, 128, 31, 200), (4, 256, 48, 300), (4, 10**30, 7, 40)],
)  # fmt: skip
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_tails(tmp_path, bits, group, n, k, symmetric):
    """Rows, columns and last groups of any size."""
    span = min(group or k, k)
    codes, scales, zeros = matrix(bits, n, k, -(-k // span), symmetric)
    folder = open_folder(
        tmp_path, config(scheme(bits, group, symmetric)),
        stored(bits, codes, scales, None if symmetric else zeros),
    )  # fmt: skip
    g_idx = torch.arange(k) // span
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)
    if bits == 8 and not symmetric:
        assert folder.packed("m.weight") is None
    else:
        assert_exact(folder.packed("m.weight"), codes, scales, zeros, g_idx)


def test_zero_points_as_they_are(tmp_path):
    """int8, as the library's versions before 0.9.4 have them."""
    codes, scales, zeros = matrix(4, 24, 64, 2, symmetric=False)
    tensors = stored(4, codes, scales)
    tensors["m.weight_zero_point"] = zeros.view(torch.int8) - 8
    folder = open_folder(tmp_path, config(scheme(symmetric=False)), tensors)
    g_idx = torch.arange(64) // 32
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)
    assert_exact(folder.packed("m.weight"), codes, scales, zeros, g_idx)


def test_chunks(tmp_path, monkeypatch):
    """Rows are unpacked some at a time: here 16, the last 5."""
    monkeypatch.setattr("memlm.io.quantized._CHUNK", 1)
    codes, scales, zeros = matrix(4, 53, 64, 2, symmetric=False)
    folder = open_folder(
        tmp_path, config(scheme(symmetric=False)), stored(4, codes, scales, zeros)
    )
    g_idx = torch.arange(64) // 32
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)
    assert_exact(folder.packed("m.weight"), codes, scales, zeros, g_idx)


@pytest.mark.parametrize("bits, group, k", [(4, 32, 160), (4, 64, 150), (8, 32, 96), (4, 256, 600)])
def test_activation_order(tmp_path, bits, group, k):
    codes, scales, zeros = matrix(bits, 19, k, -(-k // group), symmetric=bits == 8)
    g_idx = (torch.arange(k) // group)[torch.randperm(k, generator=torch.manual_seed(2))]
    symmetric = bits == 8
    rules = scheme(bits, group, symmetric, actorder="group")
    tensors = stored(bits, codes, scales, None if symmetric else zeros, g_idx)
    folder = open_folder(tmp_path, config(rules), tensors)
    result = folder.packed("m.weight")
    assert result.order.long().sort().values.equal(torch.arange(k))
    same = g_idx[result.order.long()].diff() == 0
    assert (result.order.diff()[same] > 0).all()  # stable within a group
    assert_exact(result, codes, scales, zeros, g_idx)
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)


@pytest.mark.parametrize(
    "g_idx", [torch.arange(96) // 32, torch.full((96,), -1)], ids=["sorted", "-1"]
)
def test_columns_in_order_need_no_order(tmp_path, g_idx):
    codes, scales, zeros = matrix(4, 8, 96, 3, symmetric=True)
    folder = open_folder(tmp_path, config(scheme()), stored(4, codes, scales, g_idx=g_idx))
    assert folder.packed("m.weight").order is None
    assert_exact(folder.packed("m.weight"), codes, scales, zeros, torch.arange(96) // 32)


def test_groups_of_unequal_sizes_are_not_packed(tmp_path):
    codes, scales, zeros = matrix(4, 8, 96, 3, symmetric=True)
    g_idx = torch.tensor([0] * 31 + [1] * 33 + [2] * 32)
    folder = open_folder(tmp_path, config(scheme()), stored(4, codes, scales, g_idx=g_idx))
    assert folder.packed("m.weight") is None
    assert_dequantised(folder.tensor("m.weight"), codes, scales, zeros, g_idx)


def test_zero_points_in_the_middle_are_symmetric(tmp_path):
    for bits, zero in ((4, 8), (8, 128), (2, 1)):
        codes, scales, zeros = matrix(bits, 8, 64, 2, symmetric=True)
        zeros[:] = zero
        folder = open_folder(
            tmp_path, config(scheme(bits, symmetric=False)), stored(bits, codes, scales, zeros)
        )
        assert folder.packed("m.weight").packed.format == Format(bits, 32)
        assert_exact(folder.packed("m.weight"), codes, scales, zeros, torch.arange(64) // 32)


def test_scales_are_f16_where_that_is_exact(tmp_path):
    """bf16 reaches below f16's 2^-24, and f32 between its numbers."""
    for scale, dtype in ((2.0**-24, torch.bfloat16), (3 * 2.0**-25, torch.bfloat16),
                         (1 / 3, torch.float32), (1e5, torch.bfloat16)):  # fmt: skip
        codes, scales, zeros = matrix(4, 8, 64, 2, symmetric=True)
        scales = torch.full_like(scales, scale, dtype=dtype)
        folder = open_folder(tmp_path, config(scheme()), stored(4, codes, scales))
        result = folder.packed("m.weight")
        assert result.packed.scales.dtype == (torch.float16 if scale == 2.0**-24 else torch.float32)
        assert_exact(result, codes, scales, zeros, torch.arange(64) // 32)


def test_several_schemes_are_told_apart_by_shape(tmp_path):
    wanted, tensors = {}, {}
    rules = [scheme(4, 32), scheme(4, 64, False), scheme(8, None), scheme(8, None, group_size=-1)]
    for name, bits, groups, symmetric in (("a", 4, 4, True), ("b", 4, 2, False), ("c", 8, 1, True)):
        wanted[name] = matrix(bits, 24, 128, groups, symmetric)
        codes, scales, zeros = wanted[name]
        for key, tensor in stored(bits, codes, scales, None if symmetric else zeros).items():
            tensors[key.replace("m.", f"{name}.")] = tensor
    folder = open_folder(tmp_path, config(*rules), tensors)
    for name, (codes, scales, zeros) in wanted.items():
        g_idx = torch.arange(128) // (128 // scales.shape[1])
        assert_exact(folder.packed(f"{name}.weight"), codes, scales, zeros, g_idx)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8' is not read"),
        ({"quant_method": ["gptq"]}, "quant_method .* is not read"),
        ({"format": "float-quantized"}, "format is 'float-quantized'"),
        ({"format": None}, "format is None"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'"),
        ({"ignore": [["lm_head"]]}, "ignore is"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"config_groups": {}}, "config_groups is"),
        ({"config_groups": [1]}, "config_groups is"),
        ({"config_groups": {"a": ["Linear"]}}, "config_groups holds"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, "weights is None"),
        ({"config_groups": {"a": {"targets": [7], "weights": {}}}}, "targets is"),
        ({"config_groups": {"a": {"format": "dense", "weights": {}}}}, "format is 'dense'"),
        ({"config_groups": {f"{g}": {"weights": {"group_size": g}} for g in range(1, 102)}},
         "101 different schemes"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path, changes, message):
    codes, scales, _ = matrix(4, 8, 64, 2, True)
    with pytest.raises(memlm.FormatError, match=message):
        open_folder(tmp_path, config(scheme(), **changes), stored(4, codes, scales))


@pytest.mark.parametrize("key, values", {
    "num_bits": (3, 4.0, True, "4", -4, 10**40), "type": ("float", 1),
    "group_size": (0, -2, 32.0, "32", True, [32]), "symmetric": (1, "true"),
    "strategy": ("block", "channel", 5), "dynamic": (True, "local"),
}.items())  # fmt: skip
def test_schemes_that_are_refused(tmp_path, key, values):
    codes, scales, _ = matrix(4, 8, 64, 2, True)
    for value in values:
        named = "group_size" if value == "channel" else key
        with pytest.raises(memlm.FormatError, match=f"{named} is"):
            open_folder(tmp_path, config(scheme(**{key: value})), stored(4, codes, scales))


SMALL = {
    "m.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
    "m.weight_scale": torch.ones(8, 2).half(),
    "m.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32),
    "m.weight_shape": torch.tensor([8, 64]),
    "m.weight_g_idx": torch.arange(64).int() // 32,
}


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("weight_packed", None),
        ("weight_packed", SMALL["m.weight_packed"].long()),
        ("weight_packed", SMALL["m.weight_packed"].view(-1)),
        ("weight_packed", torch.zeros(8, 9, dtype=torch.int32)),
        ("weight_packed", torch.zeros(8, 0, dtype=torch.int32)),
        ("weight_scale", None),
        ("weight_scale", torch.ones(8, 2).int()),
        ("weight_scale", torch.ones(8, 2).double()),
        ("weight_scale", torch.ones(8, 3).half()),
        ("weight_scale", torch.ones(2, 8).half()),
        ("weight_scale", torch.ones(16).half()),
        ("weight_scale", torch.tensor([[1.0, float("nan")]] * 8)),
        ("weight_scale", torch.tensor([[1.0, float("-inf")]] * 8)),
        ("weight_zero_point", None),
        ("weight_zero_point", torch.zeros(1, 2, dtype=torch.int8)),
        ("weight_zero_point", torch.zeros(8, 2, dtype=torch.uint8)),
        ("weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)),
        ("weight_shape", None),
        ("weight_shape", torch.tensor([8, 64, 1])),
        ("weight_shape", torch.tensor([[8, 64]])),
        ("weight_shape", torch.tensor([8.0, 64.0])),
        ("weight_shape", torch.tensor([9, 64])),
        ("weight_shape", torch.tensor([8, 0])),
        ("weight_shape", torch.tensor([-8, -64])),
        ("weight_shape", torch.tensor([8, 2**62])),
        ("weight_g_idx", torch.full((64,), 2, dtype=torch.int32)),
        ("weight_g_idx", torch.arange(64).int() - 1),
        ("weight_g_idx", torch.arange(63).int() // 32),
        ("weight_g_idx", torch.ones(64)),
        ("weight", torch.ones(8, 64)),
        ("input_scale", torch.ones(1)),
    ],
)
def test_tensors_that_are_refused(tmp_path, name, tensor):
    tensors = {**SMALL, f"m.{name}": tensor}
    if tensor is None:
        del tensors[f"m.{name}"]
    where = "weight_(packed|shape)" if name == "weight_shape" else name
    for read in ("tensor", "packed"):
        with pytest.raises(memlm.FormatError, match=rf"m\.{where}: "):
            folder = open_folder(tmp_path, config(scheme(symmetric=False)), tensors)
            getattr(folder, read)("m.weight")


def test_an_order_that_is_missing_is_refused(tmp_path):
    tensors = {name: tensor for name, tensor in SMALL.items() if name != "m.weight_g_idx"}
    folder = open_folder(tmp_path, config(scheme(symmetric=False, actorder="group")), tensors)
    with pytest.raises(memlm.FormatError, match="m.weight_g_idx: is missing"):
        folder.packed("m.weight")


def test_what_fits_two_schemes_is_refused(tmp_path):
    """100 columns are two groups of 64 and of 96."""
    codes, scales, _ = matrix(4, 8, 100, 2, True)
    folder = open_folder(
        tmp_path, config(scheme(group=64), scheme(group=96)), stored(4, codes, scales)
    )
    with pytest.raises(memlm.FormatError, match="m.weight_scale: fits several"):
        folder.packed("m.weight")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_folders_are_read_or_raise_format_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated"
    open_folder(path, config(scheme(symmetric=False)), SMALL)
    read_mutated(path, data)


# --- what is written -----------------------------------------------------------------------------


class Memory:
    """A checkpoint of what it is given: name -> tensor or PackedTensor."""

    def __init__(self, config, stored):
        self.config, self.stored = config, stored

    def names(self):
        return list(self.stored)

    def packed(self, name):
        return self.stored[name] if isinstance(self.stored[name], PackedTensor) else None

    def tensor(self, name):
        stored = self.packed(name)
        return self.stored[name] if stored is None else formats.dequantize(stored.packed)

    def release(self, name):
        assert name in self.stored


def packed_matrix(format, n, k, dtype=torch.float16):
    """Of random codes; asymmetric: with zero points that are integers, and exactly so."""
    format = Format.parse(format)
    g = torch.Generator().manual_seed(n)
    q = torch.randint(format.codes[0], format.codes[-1] + 1, (n, k), generator=g)
    q = q.to(torch.int8 if format.bits == 8 else torch.uint8)
    groups = format.groups(k)
    scales = (torch.randn(n, groups, generator=g) / 64).to(dtype)  # negative ones, too
    if format.symmetric:
        return formats.pack(q, scales, None, format)
    zeros = torch.randint(1 << format.bits, (n, groups), generator=g)
    scales = scales.half().float()
    return formats.pack(q, scales, -zeros * scales, format)


FORMATS = ["int4-g32", "int4-g128", "int4a-g32", "int4a-g64", "int8-row", "int8-g32", "int8-g128",
           "int2-g32", "int2a-g64", "ternary-g128"]  # fmt: skip


@pytest.mark.parametrize("n, k", [(16, 256), (37, 192), (9, 96), (11, 100), (70, 1)])
@pytest.mark.parametrize("format", FORMATS)
def test_the_library_reads_what_is_written(tmp_path, monkeypatch, format, n, k):
    """Its decompressed weights, to the bit, for any shape: short last groups are cut up."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    monkeypatch.setattr(compressed_tensors, "_CHUNK", 1)
    packed = packed_matrix(format, n, k, torch.float32)
    stored = {"m.weight": PackedTensor(packed), "norm.weight": torch.ones(3).bfloat16()}
    assert compressed_tensors.write(tmp_path, Memory({}, stored)) == []
    folder = Folder(tmp_path)
    assert folder.tensor("norm.weight").dtype == torch.bfloat16
    rules = quantization.QuantizationConfig.model_validate(folder.config["quantization_config"])
    (scheme,) = rules.config_groups.values()
    assert scheme.targets == ["m"] and rules.ignore == []
    state = {name[2:]: folder.tensor(name) for name in folder.names() if name.startswith("m.")}
    w = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    exact = formats.dequantize(packed, torch.float64)
    assert w.dtype == torch.float32 and torch.equal(w, exact.float())
    back = open_quantized(folder)
    assert torch.equal(back.tensor("m.weight"), w)
    if k % 32 == 0 and packed.format.codebook == "int":
        result = back.packed("m.weight").packed
        assert torch.equal(formats.unpack(result)[0], formats.unpack(packed)[0])
        assert torch.equal(formats.dequantize(result, torch.float64), exact)


MIXED = {"q_proj": "int4-g32", "k_proj": "int8-row", "v_proj": "int4-g32", "o_proj": "int8-g64",
         "gate_proj": "int4-g64", "up_proj": "int8-row", "down_proj": "int4-g128",
         "embed_tokens": "int8-g32", "lm_head": "int8-g32"}  # fmt: skip
MIXED_ASYMMETRIC = {**MIXED, "v_proj": "int4a-g32", "up_proj": "int4a-g64"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kinds", [MIXED, MIXED_ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_transformers_loads_what_is_written(tmp_path, tied, kinds):
    """A llama of several formats; the same logits as with the dequantised weights."""
    library = pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    if kinds is MIXED_ASYMMETRIC and tuple(map(int, library.__version__.split(".")[:2])) > (0, 17):
        pytest.skip("from 0.18 on its empty modules have zero points of another shape")
    model = tiny.llama(tmp_path / "float", tie_word_embeddings=tied, intermediate_size=128)
    stored = {}
    for name, tensor in model.state_dict().items():
        format = kinds.get(name.split(".")[-2])
        if not (tied and name == "lm_head.weight"):
            made = PackedTensor(packed_matrix(format, *tensor.shape)) if format else tensor
            stored[name] = made
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    memory = Memory(config, stored)
    seen = []
    rounded = compressed_tensors.write(
        tmp_path, memory, floats={"model.embed_tokens"}, progress=lambda *x: seen.append(x)
    )
    assert rounded == [] and [x[0] for x in seen] == list(range(1, seen[0][1] + 1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(256, (2, 20), generator=torch.manual_seed(1))
    logits = tiny.logits(theirs, ids)
    quantised = [name for name, m in theirs.named_modules() if hasattr(m, "quantization_scheme")]
    assert len(quantised) == 14 + (not tied)
    model.load_state_dict({name: memory.tensor(name) for name in stored}, strict=not tied)
    assert torch.equal(logits, tiny.logits(model, ids))
    # And this library again: the same codes, and the product of packed layers.
    again = open_checkpoint(tmp_path)
    assert sorted(again.names()) == sorted(stored)
    for name in stored:
        assert torch.equal(again.tensor(name), memory.tensor(name))
        packed = name.split(".")[-2] in kinds and "embed" not in name
        assert (again.packed(name) is not None) == packed
    ours = memlm.load(tmp_path)
    for layer in ours.modules():
        if isinstance(layer, memlm.layers.Linear):
            layer.mode = "accurate"
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_dequantises_what_is_written(tmp_path):
    """Asymmetric matrices of one scheme, as every version of the library can load them."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = tiny.llama(tmp_path / "float", intermediate_size=128)
    stored = {
        name: PackedTensor(packed_matrix("int4a-g32", *t.shape)) if "proj" in name else t
        for name, t in model.state_dict().items()
    }
    memory = Memory(json.loads((tmp_path / "float" / "config.json").read_text()), stored)
    compressed_tensors.write(tmp_path, memory)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    ids = torch.randint(256, (2, 20), generator=torch.manual_seed(1))
    model.load_state_dict({name: memory.tensor(name) for name in stored})
    assert torch.equal(tiny.logits(theirs, ids), tiny.logits(model, ids))


def test_offsets_that_are_no_zero_points_are_refused(tmp_path):
    g = torch.Generator().manual_seed(0)
    q = torch.randint(16, (8, 64), generator=g, dtype=torch.uint8)
    scales = torch.rand(8, 2, generator=g) + 1
    zeros = torch.randint(1, 14, (8, 2), generator=g).float()
    zeros[3, 1] += 0.25
    packed = formats.pack(q, scales.half(), (-zeros * scales.half()).half(), "int4a-g32")
    memory = Memory({}, {"m.weight": PackedTensor(packed)})
    with pytest.raises(ValueError, match=r"m: int4a-g32 has offsets .* of a step"):
        compressed_tensors.write(tmp_path, memory)
    assert list(tmp_path.iterdir()) == []


def test_offsets_near_the_middle_are_not_taken_for_symmetric(tmp_path):
    q = torch.zeros(4, 32, dtype=torch.uint8)
    packed = formats.pack(q, torch.ones(4, 1), torch.full((4, 1), -8.25), "int4a-g32")
    with pytest.raises(ValueError, match="m: .* up to 0.25, 0.25 of a step"):
        compressed_tensors.write(tmp_path, Memory({}, {"m.weight": PackedTensor(packed)}))
    packed = formats.pack(q, torch.zeros(4, 1), torch.full((4, 1), 0.5), "int4a-g32")
    with pytest.raises(ValueError, match="m: .* up to 0.5, inf of a step"):
        compressed_tensors.write(tmp_path, Memory({}, {"m.weight": PackedTensor(packed)}))


def test_what_the_format_does_not_hold_is_refused(tmp_path):
    order = torch.arange(64).flip(0).int()
    for stored, message in (
        (PackedTensor(packed_matrix("int4-g32", 8, 64), order), "m: its columns have an order"),
        (PackedTensor(packed_matrix("nf4-g32", 8, 64)), "m: nf4-g32 is not among"),
    ):
        with pytest.raises(ValueError, match=message):
            compressed_tensors.write(tmp_path, Memory({}, {"m.weight": stored}))
    with pytest.raises(ValueError, match="config: dtype is 'int8'"):
        compressed_tensors.write(tmp_path, Memory({"dtype": "int8"}, {"m.weight": torch.ones(2)}))
    assert list(tmp_path.iterdir()) == []


def test_some_names(tmp_path):
    """Of what the checkpoint has, these; bf16 rounds."""
    packed = PackedTensor(packed_matrix("int8-g32", 8, 64))
    stored = {"a.weight": packed, "b.weight": packed, "b.bias": torch.ones(8), "y": packed}
    memory = Memory({"torch_dtype": "bfloat16"}, stored)
    names = ["a.weight", "b.weight", "b.bias"]
    rounded = compressed_tensors.write(tmp_path, memory, names, floats=["b"])
    folder = open_checkpoint(tmp_path)
    assert sorted(folder.names()) == sorted(names) and rounded == ["b.weight"]
    assert folder.config["dtype"] == "bfloat16" and "torch_dtype" not in folder.config
    assert folder.config["quantization_config"]["ignore"] == ["b"]
    w = formats.dequantize(packed.packed)
    assert torch.equal(folder.tensor("a.weight"), w) and folder.packed("a.weight") is not None
    assert torch.equal(folder.tensor("b.weight"), w.bfloat16())


def test_without_codes_a_float_folder_is_written(tmp_path):
    compressed_tensors.write(tmp_path, Memory({"model_type": "x"}, {"m.weight": torch.ones(2, 3)}))
    folder = open_checkpoint(tmp_path)
    assert folder.config == {"model_type": "x", "dtype": "float32"}
    assert folder.tensor("m.weight").tolist() == [[1, 1, 1]] * 2
