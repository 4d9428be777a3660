"""GGUF against the gguf library and transformers, and against files that lie."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import memlm
from memlm import data, formats
from memlm.io.ggml_types import TYPES
from memlm.io.gguf import GGUF
from memlm.io.tokenizer import load_tokenizer
from memlm.memory import file_mapping

from . import tiny, tiny_gguf
from .tiny_gguf import BOOL, F32, TEXT, U32, array, entry, key

FILE = "model.gguf"
KINDS = [Type.Q4_1, Type.Q8_0, Type.F16, Type.Q4_0, Type.BF16, Type.F32]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Widths that are whole blocks of 32."""
    return tiny.llama(tmp_path_factory.mktemp("llama"), intermediate_size=128)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("gguf") / FILE
    return path, tiny_gguf.write_llama(path, model, KINDS)


def test_types_are_those_of_ggml():
    for number, kind in TYPES.items():
        assert Type(number).name == kind.name
        assert gguf.GGML_QUANT_SIZES[number] == (kind.values, kind.block.itemsize)


# Where a block has its f16 numbers.
F16_AT = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "IQ4_NL": [0],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}  # fmt: skip


def random_file(path, kind, rows=37, k=512):
    """output.weight [rows, k] of random blocks, all bits but for finite scales; the raw bytes."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(256, size=(rows, k // block * size), dtype=np.uint8)
    for at in F16_AT.get(kind.name, []):
        scales = rng.normal(0, 3, (rows, k // block)).astype(np.float16)
        raw.reshape(rows, -1, size)[..., at : at + 2] = scales.view(np.uint8).reshape(rows, -1, 2)
    table = [entry("output.weight", (k, rows), int(kind), 1024)]
    path.write_bytes(tiny_gguf.raw(table=table, data=b"\0" * 1024 + raw.tobytes()))
    return raw


every_type = pytest.mark.parametrize(
    "kind", [Type[t.name] for t in TYPES.values()], ids=lambda k: k.name
)


@every_type
def test_values_are_those_of_the_gguf_library(tmp_path, kind):
    """Every bit, for random blocks: all codes, any finite scale."""
    raw = random_file(tmp_path / FILE, kind)
    ours = GGUF(tmp_path / FILE).read("output.weight")
    if kind.name in ("F16", "F32"):
        wanted = torch.from_numpy(raw.view(f"f{gguf.GGML_QUANT_SIZES[kind][1]}"))
    else:
        wanted = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    floats = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}
    assert ours.dtype == floats.get(kind, torch.float32)
    assert torch.equal(ours.to(wanted.dtype).nan_to_num(7), wanted.nan_to_num(7))
    assert ours.shape == (37, 512) and ours.float().isfinite().float().mean() > 0.9


@every_type
def test_packed_values_are_those_of_the_gguf_library(tmp_path, kind):
    """What stays in codes stands for the same numbers, to the bit."""
    raw = random_file(tmp_path / FILE, kind, rows=4099, k=256)  # more than a chunk
    stored = GGUF(tmp_path / FILE).packed("lm_head.weight")
    kept = {"Q8_0": "int8-g32", "Q4_0": "int4-g32", "Q4_1": "int4a-g32", "Q5_0": "int8-g32",
            "IQ4_NL": "int8-g32", "Q4_K": "int4a-g32"}  # fmt: skip
    assert (stored is None) is (kind.name not in kept)
    if stored is not None:
        assert stored.packed.format.name == kept[kind.name] and stored.order is None
        wanted = torch.from_numpy(gguf.quants.dequantize(raw, kind))
        assert torch.equal(formats.dequantize(stored.packed), wanted)


def test_scales_that_are_not_finite_are_refused(tmp_path):
    random_file(tmp_path / FILE, Type.Q4_0)
    text = bytearray((tmp_path / FILE).read_bytes())
    at = GGUF(tmp_path / FILE).tensors["output.weight"].offset
    text[at : at + 2] = b"\0\x7c"
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(memlm.FormatError, match="output.weight: scales: contains NaN or Inf"):
        GGUF(tmp_path / FILE).packed("lm_head.weight")


def test_a_llama_runs_on_the_files_codes(mixed):
    """As its dequantised self, but for the rounding of sums; the codes are the file's."""
    path, stored = mixed
    packed, floats = memlm.load(path), memlm.load(path, dequantize=True)
    for module in packed.modules():
        if isinstance(module, memlm.layers.Linear):
            module.mode = "accurate"
    ids = torch.randint(256, (2, 40), generator=torch.manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids), floats(ids), rtol=1e-4, atol=1e-4)
    formats_of = {row.format for row in memlm.explain(packed).rows}
    assert formats_of == {"int8-g32", "int4-g32", "int4a-g32", "float32"}
    assert {row.format for row in memlm.explain(floats).rows} == {"float32"}


def test_a_llama_comes_back_under_its_names(mixed, model):
    """Quantised types round, so compared with what the library makes of the stored data; q and k
    in the order that they had in transformers' model."""
    path, stored = mixed
    ours = GGUF(path)
    assert sorted(ours.names()) == sorted(stored)
    heads = {"q_proj": 4, "k_proj": 2}
    for name, (kind, raw) in stored.items():
        wanted = gguf.quants.dequantize(raw, kind)
        original = model.state_dict()[name]
        part = name.split(".")[-2]
        if part in heads:  # undo by index, unlike either implementation
            rows = len(wanted) // heads[part]
            order = [h * rows + (2 * i if i < rows // 2 else 2 * i - rows + 1)
                     for h in range(heads[part]) for i in range(rows)]  # fmt: skip
            wanted = wanted[order]
        tensor = ours.tensor(name)
        assert torch.equal(tensor.float(), torch.from_numpy(wanted.astype(np.float32)))
        error = (tensor.float() - original).abs().max() / original.abs().max()
        assert error < {Type.Q4_0: 0.15, Type.Q4_1: 0.15, Type.Q8_0: 0.01}.get(kind, 0.005)


@pytest.mark.parametrize("tied", [False, True])
def test_float_file_equals_transformers(tmp_path, tied):
    """What memlm.load makes of it computes what transformers' model computes, and transformers
    understands the metadata alike."""
    theirs = tiny.llama(tmp_path / "hf", tie_word_embeddings=tied, rope_parameters={
        "rope_type": "default", "rope_theta": 5000.0})  # fmt: skip
    tiny_gguf.write_llama(tmp_path / FILE, theirs)
    ours = memlm.load(tmp_path / FILE)
    ids = torch.randint(256, (2, 40), generator=torch.manual_seed(1))
    with torch.inference_mode():
        logits = ours(ids)
    torch.testing.assert_close(logits, tiny.logits(theirs, ids), rtol=1e-4, atol=1e-4)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=FILE)
    config = GGUF(tmp_path / FILE).config
    for field, value in config.items():
        if field not in ("architectures", "rope_theta"):
            assert getattr(theirs, field) == value, field
    assert config["rope_theta"] == theirs.rope_parameters["rope_theta"] == 5000


def test_metadata_are_those_of_the_gguf_library(mixed):
    fields = gguf.GGUFReader(mixed[0]).fields
    ours = GGUF(mixed[0]).metadata
    wanted = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert ours == wanted and len(ours) > 15


def test_every_metadata_type(tmp_path):
    def edit(writer):
        for kind, value in (("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -32768),
                            ("uint32", 2**32 - 1), ("int32", -(2**31)), ("uint64", 2**64 - 1),
                            ("int64", -(2**63)), ("float32", 0.5), ("float64", 0.1),
                            ("bool", True), ("string", "é")):  # fmt: skip
            getattr(writer, f"add_{kind}")(f"x.{kind}", value)
        writer.add_array("x.numbers", [1, -2, 3])
        writer.add_array("x.floats", [0.5, 1.5])
        writer.add_array("x.bools", [True, False])
        writer.add_array("x.strings", ["a", "", "ü"])

    tiny_gguf.write_llama(tmp_path / FILE, tiny.llama(tmp_path / "hf"), edit=edit)
    ours = GGUF(tmp_path / FILE).metadata
    assert {k[2:]: v for k, v in ours.items() if k.startswith("x.")} == {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1,
        "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1,
        "bool": True, "string": "é", "numbers": [1, -2, 3], "floats": [0.5, 1.5],
        "bools": [True, False], "strings": ["a", "", "ü"],
    }  # fmt: skip


def test_float_tensors_are_mapped_and_writing_leaves_the_file(tmp_path):
    rows = 4096
    path = tmp_path / FILE
    path.write_bytes(tiny_gguf.raw(table=[entry("output.weight", (64, rows), 0, 1024)],
                                   data=b"\0" * (1024 + 256 * rows)))  # fmt: skip
    before = path.read_bytes()
    tensor = GGUF(path).tensor("lm_head.weight")  # holds the map without the object
    assert tensor.sum() == 0
    mapped = file_mapping(path)
    assert mapped.size >= len(before) and mapped.private == 0
    tensor.fill_(1)
    assert file_mapping(path).private >= 256 * rows
    assert path.read_bytes() == before


def test_version_2_and_another_alignment(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(tiny_gguf.raw(version=2))
    assert GGUF(path).names() == ["model.embed_tokens.weight"]
    table = [entry("output.weight", (1,), 0, 1032)]
    text = tiny_gguf.raw({"general.alignment": (U32, 8)}, table=table, data=b"\1" * 2048)
    path.write_bytes(text)
    assert GGUF(path).read("output.weight").view(torch.int32).tolist() == [0x01010101]
    table = [entry("output.weight", (1,), 0, 1088)]
    text = tiny_gguf.raw({"general.alignment": (U32, 64)}, table=table, data=b"\0" * 2048)
    path.write_bytes(text)
    assert GGUF(path).tensors["output.weight"].offset % 64 == 0


def test_missing_file_and_unknown_name(mixed):
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        GGUF("nowhere.gguf")
    with pytest.raises(KeyError, match="blk.0.attn_q.weight"):
        GGUF(mixed[0]).tensor("blk.0.attn_q.weight")


# --- files that lie ------------------------------------------------------------------------------

BIG = 2**64 - 1
HOSTILE = {
    "not GGUF": (b"GGML" + b"\0" * 100, "not a GGUF file"),
    "empty": (b"", "not a GGUF file"),
    "only magic": (b"GGUF", "truncated: 4 bytes wanted, 0 left"),
    "version": (tiny_gguf.raw(version=1), "version 1"),
    "big-endian": (tiny_gguf.raw(version=0x03000000), "version 50331648.*little-endian"),
    "metadata count": (tiny_gguf.raw(count=BIG, data=b""), "truncated|not UTF-8|is there twice"),
    "tensor count": (tiny_gguf.raw(tensors=BIG), "0 dimensions|truncated"),
    "string length": (b"GGUF\3\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\xff" * 8, "truncated"),
    "array length": (tiny_gguf.raw(keys=[array("a", U32, [], BIG)]), "truncated"),
    "array of strings": (tiny_gguf.raw(keys=[array("a", TEXT, [], BIG)]), "truncated|not UTF-8"),
    "array in array": (tiny_gguf.raw(keys=[array("a", 9, [], 1)]), "type 9 in an array"),
    "array of unknown": (tiny_gguf.raw(keys=[array("a", 77, [], 1)]), "type 77 in an array"),
    "metadata type": (
        tiny_gguf.raw(keys=[tiny_gguf.string("a") + b"\x63\0\0\0"]), "type 99 is not read"),
    "not UTF-8": (tiny_gguf.raw(keys=[key("a", TEXT, b"\xff\xfe")]), r"not UTF-8: b'\\xff\\xfe'"),
    "key twice": (tiny_gguf.raw(keys=[key("llama.block_count", U32, 2)]),
                  "llama.block_count is there twice"),
    "tensor twice": (tiny_gguf.raw(table=[entry("token_embd.weight", (8, 1), 0, 1024)],
                                   data=b"\0" * 2048), "token_embd.weight is there twice"),
    "overlap": (tiny_gguf.raw(table=[entry("output.weight", (8, 4), 0, 992)]), "overlaps"),
    "unaligned": (tiny_gguf.raw(table=[entry("output.weight", (1,), 0, 1028)],
                                data=b"\0" * 2048), "offset 1028, which is no multiple of 32"),
    "beyond": (tiny_gguf.raw(table=[entry("output.weight", (8, 32), 0, 1024)]), "truncated"),
    "offset": (tiny_gguf.raw(table=[entry("output.weight", (8,), 0, BIG - 31)]), "truncated"),
    "no dimension": (tiny_gguf.raw(table=[entry("output.weight", ())]), "0 dimensions"),
    "5 dimensions": (tiny_gguf.raw(table=[entry("output.weight", (1,) * 5)]), "5 dimensions"),
    "product overflows": (
        tiny_gguf.raw(table=[entry("output.weight", (2**32, 2**32, 1), 0, 1024)]), "truncated"),
    "product wraps to 8": (
        tiny_gguf.raw(table=[entry("output.weight", (2**63 + 4, 2), 0, 1024)]), "truncated"),
    "zero rows": (tiny_gguf.raw(table=[entry("output.weight", (8, 0), 0, 1024)]), "not fit F32"),
    "part of a block": (tiny_gguf.raw(table=[entry("output.weight", (48, 2), 2, 1024)]),
                        r"shape \(48, 2\) does not fit Q4_0"),
    "tensor type": (tiny_gguf.raw(table=[entry("output.weight", (256,), 10)]),
                    r"output.weight is of ggml type 10; read are F32 \(0\), .*Q4_1 \(3\)"),
    "alignment 0": (tiny_gguf.raw({"general.alignment": (U32, 0)}), "general.alignment is 0"),
    "alignment 12": (tiny_gguf.raw({"general.alignment": (U32, 12)}), "general.alignment is 12"),
    "alignment bool": (tiny_gguf.raw({"general.alignment": (BOOL, True)}), "alignment is True"),
    "alignment text": (tiny_gguf.raw({"general.alignment": (TEXT, "32")}), "alignment is '32'"),
    "architecture": (tiny_gguf.raw({"general.architecture": (TEXT, "qwen2")}),
                     "general.architecture is 'qwen2'; expected 'llama'"),
    "no architecture": (tiny_gguf.raw({"general.architecture": None}), "architecture is missing"),
    "no width": (tiny_gguf.raw({"llama.embedding_length": None}), "embedding_length is missing"),
    "width as text": (tiny_gguf.raw({"llama.embedding_length": (TEXT, "8")}), "is '8'; expected"),
    "width bool": (tiny_gguf.raw({"llama.embedding_length": (BOOL, True)}), "is True; expected"),
    "width float": (tiny_gguf.raw({"llama.embedding_length": (F32, 8.0)}), "is 8.0; expected"),
    "no heads": (tiny_gguf.raw({"llama.attention.head_count": (U32, 0)}), "head_count is 0"),
    "NaN": (tiny_gguf.raw({"llama.rope.freq_base": (F32, float("nan"))}), "freq_base is nan"),
    "infinity": (tiny_gguf.raw({"llama.rope.freq_base": (F32, float("inf"))}), "freq_base is inf"),
    "layers": (tiny_gguf.raw({"llama.block_count": (U32, 2**31 - 1)}),
               "block_count is 2147483647; expected at most the number of tensors, 1"),
    "odd head": (tiny_gguf.raw({"llama.attention.key_length": (U32, 5)}), "heads of 5 values"),
    "partial rotation": (tiny_gguf.raw({"llama.rope.dimension_count": (U32, 2)}),
                         "rope.dimension_count is 2; expected the whole head, 4"),
    "yarn": (tiny_gguf.raw({"llama.rope.scaling.type": (TEXT, "yarn")}), "type is 'yarn'"),
    "frequencies": (tiny_gguf.raw(table=[entry("rope_freqs.weight", (2,), 0, 1024)],
                                  data=b"\0" * 2048), "scaled rotary frequencies"),
    "experts": (tiny_gguf.raw({"llama.expert_count": (U32, 8)}), "expert_count is 8; expected 0"),
    "split": (tiny_gguf.raw({"split.count": (U32, 3)}), "split.count is 3; expected 0 or 1"),
    "unknown tensor": (tiny_gguf.raw(table=[entry("blk.0.ffn_gate_inp.weight", (8,), 0, 1024)],
                                     data=b"\0" * 2048), "ffn_gate_inp.weight' is not known"),
    "eos": (tiny_gguf.raw({"tokenizer.ggml.eos_token_id": (TEXT, "2")}), "eos_token_id is '2'"),
    "long value": (tiny_gguf.raw({"general.architecture": (TEXT, "x" * 9999)}), "xxx; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_lie(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(memlm.FormatError, match=f"{FILE}: .*({message})") as error:
        GGUF(tmp_path / FILE)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_the_raw_file_is_good_when_nothing_is_changed(tmp_path):
    """So that the cases above fail for their own reason."""
    (tmp_path / FILE).write_bytes(tiny_gguf.raw())
    assert GGUF(tmp_path / FILE).tensor("model.embed_tokens.weight").shape == (32, 8)


def test_no_embedding(tmp_path):
    text = tiny_gguf.raw().replace(b"token_embd.weight", b"output_nor.weight")
    (tmp_path / FILE).write_bytes(text.replace(b"output_nor.weight", b"blk.0.ffn_up.bias"))
    with pytest.raises(memlm.FormatError, match="has no token_embd.weight matrix"):
        GGUF(tmp_path / FILE)


def test_rows_that_are_no_whole_heads(tmp_path):
    (tmp_path / FILE).write_bytes(
        tiny_gguf.raw(table=[entry("blk.0.attn_q.weight", (8, 12), 0, 1024)], data=b"\0" * 2048)
    )
    with pytest.raises(memlm.FormatError, match="q_proj.weight: 12 rows, .* 2 heads of 4"):
        GGUF(tmp_path / FILE).tensor("model.layers.0.self_attn.q_proj.weight")


def test_every_truncation(mixed, tmp_path):
    content = mixed[0].read_bytes()
    end = max(tensor.end for tensor in GGUF(mixed[0]).tensors.values())
    for size in [*range(0, 6000, 7), *range(6000, end, 997), end - 1]:
        (tmp_path / FILE).write_bytes(content[:size])
        with pytest.raises(memlm.FormatError):
            GGUF(tmp_path / FILE)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_files_open_or_raise_format_error(mixed, tmp_path_factory, data):
    """Whatever opens can be read whole, and holds no more than the file could."""
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    raw = bytearray(mixed[0].read_bytes())
    table = raw.index(b"\x11\0\0\0\0\0\0\0token_embd") + 2200  # beyond the header's end
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, table))
        length = data.draw(st.sampled_from([1, 1, 4, 8]))
        raw[at : at + length] = data.draw(
            st.binary(min_size=length, max_size=length)
            | st.sampled_from([b"\0" * length, b"\xff" * length, b"\1".ljust(length, b"\0")])
        )
    path.write_bytes(raw)
    try:
        file = GGUF(path)
        total = sum(file.tensor(name).numel() for name in file.names())
        assert total <= len(raw) * 2  # 4 bits a value at least
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("the 12 things"))
    except memlm.FormatError:
        pass


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.models
def test_smollm2_equals_the_gguf_library():
    reader = {t.name: t for t in gguf.GGUFReader(data.smollm2_gguf()).tensors}
    ours = GGUF(data.smollm2_gguf())
    assert len(ours.tensors) == len(reader) == 272
    counts = {}
    for name, tensor in ours.tensors.items():
        counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
        theirs = gguf.quants.dequantize(reader[name].data, reader[name].tensor_type)
        assert torch.equal(ours.read(name), torch.tensor(theirs))
    assert counts == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert ours.config["tie_word_embeddings"] and ours.config["head_dim"] == 64
