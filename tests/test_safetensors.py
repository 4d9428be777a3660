"""Written files read by the safetensors library; mapped files looked up in the memory map."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm.io import safetensors as ours
from memlm.memory import file_mapping

FILE = "model.safetensors"


def same(a, b):
    def raw(tensor):
        return tensor.contiguous().view(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and raw(a).equal(raw(b))


def header(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def bytes_of(text, data=b"\0" * 64):
    text = text.encode()
    return len(text).to_bytes(8, "little") + text + data


def one(dtype="U8", shape="[64]", offsets="[0,64]"):
    return '{"a":{"dtype":"%s","shape":%s,"data_offsets":%s}}' % (dtype, shape, offsets)


# --- writing -------------------------------------------------------------------------------------


def test_golden_bytes(tmp_path):
    """int16 before the 3 bytes, data at 320 = 5 * 64, little-endian; the checksums are
    those of `printf '\\x02\\x01\\xff\\xff' | sha256sum` and of the last three bytes."""
    tensors = {"b": torch.tensor([1, 2, 3], dtype=torch.uint8),
               "a": torch.tensor([[258], [-1]], dtype=torch.int16)}  # fmt: skip
    size = ours.write(tmp_path / FILE, tensors, {"format": "x"})
    text = (
        b'{"__metadata__":{"format":"x","sha256":"'
        b'88927315fe1ddd910708397110d3dc316f8132cb35209bedb2afdd2bd9e7b8d9 '
        b'039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81"},'
        b'"a":{"dtype":"I16","shape":[2,1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}'
    )
    assert (tmp_path / FILE).read_bytes() == (
        (320 - 8).to_bytes(8, "little") + text.ljust(320 - 8) + b"\x02\x01\xff\xff" + b"\1\2\3"
    )
    assert size == 327


DTYPES = sorted(ours._DTYPES, key=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(tmp_path, dtype):
    data = torch.randint(256, (6, 8), dtype=torch.uint8, generator=torch.manual_seed(1))
    tensor = (data > 127) if dtype == torch.bool else data.view(dtype)
    ours.write(tmp_path / FILE, {"t": tensor}, {})
    assert same(safetensors.torch.load_file(tmp_path / FILE)["t"], tensor)
    assert same(ours.open_mapped(tmp_path / FILE)[0]["t"], tensor)


def test_any_strides_and_metadata(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": base.T, "sliced": base[:, ::2], "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(3.5), "none": torch.empty(0, 5),
        "gradient": base.clone().requires_grad_(),
    }  # fmt: skip
    metadata = {"name": "Müller\n", "": "empty key"}
    ours.write(tmp_path / FILE, tensors, metadata)
    back, their = ours.open_mapped(tmp_path / FILE)
    assert {**their, "sha256": ""} == {**metadata, "sha256": ""}
    for reader in (back, safetensors.torch.load_file(tmp_path / FILE)):
        assert reader.keys() == tensors.keys()
        assert all(same(reader[name], tensors[name].detach()) for name in tensors)


def test_no_tensors(tmp_path):
    assert ours.write(tmp_path / FILE, {}, {}) == 64
    assert ours.open_mapped(tmp_path / FILE)[0] == {} and ours.verify(tmp_path / FILE)


def test_checksum(tmp_path):
    path = tmp_path / FILE
    ours.write(path, {"a": torch.arange(3 << 18)}, {})
    assert ours.verify(path)
    good = path.read_bytes()
    for at in (-1, len(good) // 2, header(path)[1]):
        bad = bytearray(good)
        bad[at] ^= 1
        path.write_bytes(bad)
        with pytest.raises(memlm.FormatError, match="damaged"):
            ours.verify(path)
    safetensors.torch.save_file({"a": torch.ones(3)}, path)
    assert ours.verify(path) is False  # others write none


def test_join(tmp_path):
    parts = {"1": {"a": torch.arange(5), "b": torch.ones(3, dtype=torch.int8)}, "2": {"c": torch.rand(700, 900)}}
    for name, tensors in parts.items():
        ours.write(tmp_path / name, tensors, {}, sync=False)
    whole = parts["1"] | parts["2"]
    files = [tmp_path / name for name in parts]
    ours.join(tmp_path / FILE, files, lambda names: sorted(names)[::-1], {"x": "y"})
    ours.write(tmp_path / "whole", {name: whole[name] for name in "cba"}, {"x": "y"})
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "whole").read_bytes()


sizes = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 70), max_size=3)), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_each_tensor_lies_at_a_multiple_of_what_divides_its_size(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("st") / FILE
    tensors = {f"{i}": torch.zeros(shape, dtype=dtype) for i, (dtype, shape) in enumerate(specs)}
    assert ours.write(path, tensors, {}) == path.stat().st_size
    entries, start = header(path)
    assert start % 64 == 0
    mapped = ours.open_mapped(path)[0]
    assert mapped.keys() == safetensors.torch.load_file(path).keys() == tensors.keys()
    for name, tensor in tensors.items():
        begin, end = entries[name]["data_offsets"]
        assert end - begin == tensor.nbytes
        for power in (2, 4, 8, 16, 32, 64):
            if tensor.nbytes % power == 0:
                assert (start + begin) % power == 0
                assert tensor.nbytes == 0 or mapped[name].data_ptr() % power == 0


@pytest.mark.parametrize(
    "tensors, metadata, error, message",
    [
        ({"c": torch.zeros(2, dtype=torch.complex128)}, {}, TypeError, "c: .*complex128"),
        ({3: torch.zeros(2)}, {}, TypeError, "3 is not a string"),
        ({"__metadata__": torch.zeros(2)}, {}, ValueError, "'__metadata__' is reserved"),
        ({"m": torch.zeros(2, device="meta")}, {}, TypeError, "m: .*meta"),
        ({"s": torch.zeros(2, 2).to_sparse()}, {}, TypeError, "s: .*sparse"),
        ({}, {"version": 1}, TypeError, "metadata: .*'version': 1"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(tmp_path, tensors, metadata, error, message):
    with pytest.raises(error, match=message):
        ours.write(tmp_path / FILE, tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    ours.write(tmp_path / FILE, {"t": torch.ones(5)}, {})
    seen = []

    def full_disk(_):
        seen.extend(file.stat().st_size for file in tmp_path.iterdir() if file.name != FILE)
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        ours.write(tmp_path / FILE, {"t": torch.zeros(1000)}, {})
    assert len(seen) == 1 and seen[0] > 4000  # everything was written by then
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert ours.open_mapped(tmp_path / FILE)[0]["t"].sum() == 5


# --- mapping -------------------------------------------------------------------------------------


def test_mapped_tensors_are_the_files_pages(tmp_path):
    """In a fresh process: all of the file resident after use, none of it private."""
    tensors = {f"t{i}": torch.full((300, 1000), i, dtype=torch.float32) for i in range(10)}
    size = ours.write(tmp_path / FILE, tensors, {})
    script = (
        "import sys; from memlm.io import safetensors; from memlm.memory import *\n"
        "before = resident_bytes(); tensors, _ = safetensors.open_mapped(sys.argv[1])\n"
        "opened = file_mapping(sys.argv[1])\n"
        "total = sum(t.sum().item() for t in tensors.values()); m = file_mapping(sys.argv[1])\n"
        "print(total, opened.resident, m.size, m.resident, m.private)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / FILE)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""  # and no warning
    total, at_opening, mapped, resident, private = map(float, done.stdout.split())
    assert total == 300_000 * 45
    assert at_opening < size / 10
    assert mapped >= size and resident >= size and private == 0


def test_writing_to_a_mapped_tensor_changes_that_copy_only(tmp_path):
    ours.write(tmp_path / FILE, {"a": torch.zeros(100_000), "b": torch.zeros(100_000)}, {})
    before = (tmp_path / FILE).read_bytes()
    first, second = (ours.open_mapped(tmp_path / FILE)[0] for _ in range(2))
    first["a"].fill_(1)
    assert first["a"].sum() == 100_000 and first["b"].sum() == second["a"].sum() == 0
    assert (tmp_path / FILE).read_bytes() == before
    assert 400_000 <= file_mapping(tmp_path / FILE).private < 420_000


def test_a_mapped_file_may_be_replaced(tmp_path):
    ours.write(tmp_path / FILE, {"t": torch.ones(1000)}, {})
    old = ours.open_mapped(tmp_path / FILE)[0]["t"]
    ours.write(tmp_path / FILE, {"t": old * 2}, {})
    assert old.sum() == 1000
    assert ours.open_mapped(tmp_path / FILE)[0]["t"].sum() == 2000


def test_files_of_others_are_read(tmp_path):
    """Whatever the alignment: this header makes f32 start at byte 8 + 67."""
    data = torch.arange(16.0)
    text = one("F32", "[16]").ljust(67)
    (tmp_path / FILE).write_bytes(bytes_of(text, data.numpy().tobytes()))
    assert ours.open_mapped(tmp_path / FILE)[0]["a"].tolist() == data.tolist()


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\x10", b"\0" * 7, b"\0" * 8, (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}", bytes_of("{"), bytes_of("[" * 100_000),
        bytes_of("[]"), bytes_of('{"a":1}'), bytes_of(one("Q4")),
        bytes_of(one(offsets="[0,65]")), bytes_of(one(offsets="[0,63]")),
        bytes_of(one(offsets="[64,0]")), bytes_of(one(offsets="[-64,0]")),
        bytes_of(one(shape="[65]")), bytes_of(one(shape="[-64]")), bytes_of(one(shape="[64.0]")),
        bytes_of(one(shape="[18446744073709551615,18446744073709551615]")),
        bytes_of(one(shape="[4611686018427387904,4]")),
        bytes_of(one(shape="[9223372036854775808,0]", offsets="[0,0]"), b""),
        bytes_of(one()[:-1] + "," + one().replace('"a"', '"b"')[1:]),  # overlap
        bytes_of(one(shape="[8]", offsets="[8,16]"), b"\0" * 16),  # a hole
        bytes_of(one(), b"\0" * 63), bytes_of(one(), b"\0" * 65),
        bytes_of('{"__metadata__":{"k":1}}', b""),
    ],
    ids=range(26),
)  # fmt: skip
def test_malformed_files(tmp_path, raw):
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(memlm.FormatError, match=f"{FILE}: not a valid safetensors file: .") as e:
        ours.open_mapped(tmp_path / FILE)
    assert "\n" not in str(e.value)


def test_missing_file(tmp_path):
    for path in (tmp_path / "x", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            ours.open_mapped(path)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_files_open_or_raise_format_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    ours.write(path, {"a": torch.ones(3, 4), "bb": torch.ones(5).bfloat16()}, {"k": "v"})
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 8 + length - 1))
        raw[at] = data.draw(st.sampled_from(b'0123456789"{}[],:-.eFBIU') | st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    try:
        tensors, _ = ours.open_mapped(path)
    except memlm.FormatError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(raw)
    for tensor in tensors.values():
        tensor.clone()
