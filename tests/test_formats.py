"""The packed formats: round trips, golden bytes, the constants that C++ shares, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import _core, formats
from memlm.errors import FormatError
from memlm.formats import Format, Packed, dequantize, layout, pack, unpack

ALL = [
    Format(bits, group, symmetric)
    for bits, groups in formats.GROUPS.items()
    for group in groups
    for symmetric in ((True, False) if bits < 8 else (True,))
]
ALL += [Format(4, 64, codebook="nf"), Format(2, 128, codebook="ternary")]


def random_parts(format: Format, n: int, k: int, seed: int = 0, dtype=torch.float16):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(format.codes.start, format.codes.stop, (n, k), generator=g)
    scales = torch.randn(n, format.groups(k), generator=g).to(dtype)
    offsets = None if format.symmetric else torch.randn(scales.shape, generator=g).to(dtype)
    return q.to(torch.int8 if format.bits == 8 else torch.uint8), scales, offsets


def test_names_round_trip():
    assert [f.name for f in ALL if f.bits == 8] == ["int8-row", "int8-g32", "int8-g64", "int8-g128"]
    for format in ALL:
        assert Format.parse(format.name) == format == Format.parse(format)
    for alias, name in formats.DEFAULTS.items():
        assert Format.parse(alias).name == name


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 70), st.integers(1, 300), st.integers(0, 99),
       st.sampled_from([torch.float16, torch.float32]))  # fmt: skip
def test_pack_round_trips(format, n, k, seed, dtype):
    parts = random_parts(format, n, k, seed, dtype)
    packed = pack(*parts, format)
    for got, expected in zip(unpack(packed), parts):
        assert (got is None and expected is None) or torch.equal(got, expected)
    shapes = layout(format, n, k, dtype)
    assert {p: (tuple(t.shape), t.dtype) for p, t in packed.tensors().items()} == shapes


@pytest.mark.parametrize("format", ALL, ids=str)
def test_dequantize_is_the_formula(format):
    """Element by element, from the definition in the module's documentation."""
    n, k = 19, 150
    q, scales, offsets = random_parts(format, n, k)
    w = dequantize(pack(q, scales, offsets, format), torch.float64)
    for i, j in [(0, 0), (18, 149), (7, 31), (7, 32), (16, 128), (3, 127)]:
        g = j // format.group if format.group else 0
        s, code = float(scales[i, g]), int(q[i, j])
        if offsets is not None:
            expected = s * code + float(offsets[i, g])
        else:
            zero = {8: 0, 4: 8, 2: 1}[format.bits]
            levels = formats.NF4_LEVELS if format.codebook == "nf" else range(-zero, 256)
            expected = s * (code if format.bits == 8 else levels[code])
        assert w[i, j] == expected


def test_golden_bytes_4_bits():
    """Row r, column k of a 17 x 40 matrix has code (r + k) % 16: where each nibble must lie."""
    q = (torch.arange(17)[:, None] + torch.arange(40)) % 16
    packed = pack(q.to(torch.uint8), torch.ones(17, 2).half(), None, "int4-g32")
    assert packed.codes.shape == (2, 8, 16, 4)
    data = packed.codes.numpy().tobytes()
    # Tile 0, block 0: row 0 holds k 0..3 in the low and k 4..7 in the high nibbles.
    assert data[:8] == bytes.fromhex("40516273" "51627384")
    # Tile 0, block 1 (k 8..15), row 15: codes 7..14.
    assert data[64 + 60 : 128] == bytes.fromhex("b7c8d9ea")
    # Tile 0, block 4 (k 32..39), row 1: codes 1..8; blocks 5 to 7 are padding.
    assert data[4 * 64 + 4 : 4 * 64 + 8] == bytes.fromhex("51627384")
    assert data[5 * 64 : 8 * 64] == bytes(192)
    # Tile 1 holds row 16 and fifteen rows of padding.
    assert data[512:576] == bytes.fromhex("40516273") + bytes(60)
    assert packed.scales.shape == (2, 2, 16)
    assert packed.scales[1, 0].tolist() == [1.0] + [0.0] * 15


def test_golden_bytes_8_bits():
    q = (torch.arange(17)[:, None] * 4 + torch.arange(34) - 20).to(torch.int8)
    scales = torch.arange(1, 18).half()[:, None]
    packed = pack(q, scales, None, "int8-row")
    assert packed.codes.shape == (2, 16, 16, 4)
    data = packed.codes.numpy().tobytes()
    assert data[:8] == bytes([0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF2, 0xF3])  # -20.., -16..
    assert data[8 * 64 : 8 * 64 + 4] == bytes([12, 13, 0, 0])  # k 32, 33 of row 0, then padding
    assert data[16 * 64 : 16 * 64 + 4] == bytes([44, 45, 46, 47])  # tile 1: row 16
    assert packed.scales[:, 0].flatten().tolist() == [*range(1, 18)] + [0.0] * 15


def test_constants_are_those_of_cpp():
    assert _core.FORMAT_VERSION == formats.VERSION
    assert _core.TILE_ROWS == formats.TILE_ROWS
    assert _core.LANE_K == formats.LANE_K
    assert _core.ACT_GROUP == formats.ACT_GROUP
    for format in ALL:
        for k in (1, 31, 32, 33, 127, 128, 129, 4096):
            assert _core.padded_k(k, format.group) == format.padded_k(k)


@pytest.mark.parametrize(
    "spec, error",
    [("int5", ValueError), ("int4-g48", ValueError), ("int4-g0", ValueError), ("int8a", ValueError),
     ("", ValueError), ("int4-g032", ValueError), (4, TypeError), (None, TypeError)],
)  # fmt: skip
def test_unknown_formats_are_refused(spec, error):
    with pytest.raises(error, match="format|group|symmetric"):
        Format.parse(spec)


@pytest.mark.parametrize("bits, group", [(3, 32), (4, 0), (4, 48), (8, 16), (2, 0)])
def test_unsupported_combinations_are_refused(bits, group):
    with pytest.raises(ValueError, match="bits|group"):
        Format(bits, group)


def test_pack_refuses_what_does_not_fit():
    q, scales, offsets = random_parts(Format(4, 32, False), 20, 96)
    good = dict(q=q, scales=scales, offsets=offsets, format="int4a-g32")
    pack(**good)
    for change, error, match in [
        ({"q": q.int()}, TypeError, "q: got torch.int32"),
        ({"q": q + 10}, ValueError, "those of int4a-g32 are 0..15"),
        ({"q": q[:0]}, ValueError, "q: got shape"),
        ({"q": q[0]}, ValueError, "q: got shape"),
        ({"scales": scales[:, :2]}, ValueError, "scales: got shape"),
        ({"scales": scales.bfloat16()}, TypeError, "scales: got torch.bfloat16"),
        ({"offsets": None}, ValueError, "offsets: got none"),
        ({"offsets": offsets.float()}, TypeError, "offsets: got torch.float32"),
        ({"offsets": offsets * float("nan")}, ValueError, "offsets: contains NaN or Inf"),
        ({"format": "int4-g32"}, ValueError, "offsets: got a tensor"),
    ]:
        with pytest.raises(error, match=match):
            pack(**{**good, **change})


def test_packed_refuses_tensors_of_another_layout():
    packed = pack(*random_parts(Format(4, 32), 20, 96), "int4-g32")
    parts = packed.tensors()
    for changed in (
        {**parts, "codes": parts["codes"][:1]},
        {**parts, "codes": parts["codes"].to(torch.int8)},
        {**parts, "scales": parts["scales"].bfloat16()},
        {**parts, "offsets": parts["scales"]},
    ):
        with pytest.raises(FormatError, match="codes|scales|offsets"):
            Packed(packed.format, 20, 96, **changed)
    with pytest.raises(FormatError):
        Packed(packed.format, 33, 96, **parts)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ALL), st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 200))
def test_rows_stack_and_split(format, sizes, k):
    whole = random_parts(format, sum(sizes), k)
    split = [None if part is None else part.split(sizes) for part in whole]
    parts = [
        pack(*(None if part is None else part[i] for part in split), format)
        for i in range(len(sizes))
    ]
    stacked = formats.stack_rows(parts)
    for mine, expected in zip(unpack(stacked), whole):
        assert (mine is None and expected is None) or torch.equal(mine, expected)
    for mine, expected in zip(formats.split_rows(stacked, sizes), parts):
        for name, tensor in expected.tensors().items():
            assert torch.equal(mine.tensors()[name], tensor)


def test_stacking_what_was_split_copies_nothing():
    whole = pack(*random_parts(Format(4, 32, False), 80, 96), "int4a-g32")
    parts = formats.split_rows(whole, [32, 48])
    assert parts[0].codes.data_ptr() == whole.codes.data_ptr()
    again = formats.stack_rows(parts)
    for name, tensor in whole.tensors().items():
        assert again.tensors()[name].data_ptr() == tensor.data_ptr()
        assert torch.equal(again.tensors()[name], tensor)
    # Not neighbours: in another order, or with something between them.
    for others in (parts[::-1], [parts[0], *formats.split_rows(whole, [48, 32])[1:]]):
        copied = formats.stack_rows(others)
        assert torch.equal(copied.codes, torch.cat([part.codes for part in others]))


def test_stack_and_split_refuse_what_does_not_fit():
    a, b = (pack(*random_parts(Format(4, 32), 16, k), "int4-g32") for k in (64, 96))
    with pytest.raises(ValueError, match="parts: got .* expected one kind"):
        formats.stack_rows([a, b])
    with pytest.raises(ValueError, match="sizes: got .* the matrix has 16 rows"):
        formats.split_rows(a, [8, 9])
