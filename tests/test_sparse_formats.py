"""The sparse formats: golden bytes, each weight where the drawing says, round trips, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import formats, sparse_formats
from memlm.errors import FormatError
from memlm.quantize import quantize_weight, sparse_quantize
from memlm.sparse_formats import (
    FLOAT_DTYPES, OVERRUN, SparseFormat, SparsePacked, dequantize, pack, split_rows, stack_rows, unpack,
)  # fmt: skip

from .sparse import mask, random_weights

ALL = [
    SparseFormat.parse(name)
    for name in (
        "block/int4-g32", "block/int4a-g32", "block/int8-g32", "block/int2a-g32", "block/nf4-g32",
        "block/ternary-g32", "block/f32", "block/bf16", "2:4/int4-g32", "2:4/int4-g64", "2:4/nf4-g64",
        "unstructured/int4-g32", "unstructured/int4-g128", "unstructured/nf4-g64",
    )
]  # fmt: skip
DENSITIES = st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0])


def random_parts(format: SparseFormat, n: int, k: int, density: float, seed: int = 0):
    """q, keep, scales and offsets, as pack takes them."""
    keep, g = mask(format, n, k, density, seed), torch.Generator().manual_seed(seed)
    if format.is_float:
        q = torch.randn(n, k, generator=g).to(FLOAT_DTYPES[format.values])
        return q, keep, None, None
    values = format.values
    q = torch.randint(values.codes.start, values.codes.stop, (n, k), generator=g)
    scales = torch.randn(n, values.groups(k), generator=g).half()
    offsets = None if values.symmetric else torch.randn(scales.shape, generator=g).half()
    return q.to(torch.int8 if values.bits == 8 else torch.uint8), keep, scales, offsets


def weight(packed: SparsePacked, i: int, j: int) -> float:
    """Row i, k j, read from the bytes as the module's documentation draws them."""
    values, t, r = packed.format.values, i // 16, i % 16
    if packed.format.pattern == "block":
        begin, end = packed.starts[t], packed.starts[t + 1]
        found = [b for b in range(begin, end) if int(packed.places[b]) == j // 32]
        if not found:
            return 0.0
        (b,), within = found, j % 32
        if packed.format.is_float:
            return float(packed.codes[b, within, r])
        data = packed.codes[b].numpy().tobytes()
        fields = 8 // values.bits  # codes in a byte
        byte = data[within // (4 * fields) * 64 + r * 4 + within % 4]
        code = byte >> within % (4 * fields) // 4 * values.bits & (1 << values.bits) - 1
        scale = float(packed.scales[b, r])
        offset = 0.0 if packed.offsets is None else float(packed.offsets[b, r])
        if values.bits == 8:
            return scale * (code - 256 if code > 127 else code)
        return scale * values.levels[code] + offset
    scale = float(packed.scales[t, j // values.group, r])
    word = int.from_bytes(packed.places[t, j // 4].numpy().tobytes(), "little")
    if packed.format.pattern == "2:4":
        pair = word >> (r % 2) * 32 + (r // 2) * 4 & 15
        byte = int(packed.codes[t, j // 4, r])
        codes = {pair & 3: byte & 15, pair >> 2: byte >> 4}
        assert len(codes) == 2
        return scale * values.levels[codes[j % 4]] if j % 4 in codes else 0.0
    bit = 4 * r + j % 4
    if not word >> bit & 1:
        return 0.0
    before = [
        int.from_bytes(packed.places[t, four].numpy().tobytes(), "little").bit_count()
        for four in range(j // 4)
    ]
    rank = (word & (1 << bit) - 1).bit_count()
    at = int(packed.starts[t]) + sum((count + 1) // 2 for count in before) + rank // 2
    return scale * values.levels[int(packed.codes[at]) >> 4 * (rank % 2) & 15]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 50), st.integers(1, 200), DENSITIES, st.integers(0, 99))
def test_each_weight_lies_where_it_is_drawn(format, n, k, density, seed):
    q, keep, scales, offsets = random_parts(format, n, k, density, seed)
    packed = pack(q, keep, scales, offsets, format)
    w = dequantize(packed, torch.float64)
    if format.is_float:
        whole = q.double()
    else:
        whole = formats.dequantize(formats.pack(q, scales, offsets, format.values), torch.float64)
    assert torch.equal(w, whole.where(keep, torch.zeros(())))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(8):
        i, j = (int(torch.randint(size, (), generator=draw)) for size in (n, k))
        assert weight(packed, i, j) == float(w[i, j])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 70), st.integers(1, 200), DENSITIES, st.integers(0, 99))
def test_pack_round_trips(format, n, k, density, seed):
    packed = pack(*random_parts(format, n, k, density, seed), format)
    again = pack(*unpack(packed), format)
    stored = {"block": len(packed.places), "unstructured": len(packed.codes) - OVERRUN}
    shapes = sparse_formats.layout(format, n, k, stored.get(format.pattern, 0))
    assert set(shapes) == set(packed.tensors())
    for name, tensor in packed.tensors().items():
        assert (tuple(tensor.shape), tensor.dtype) == shapes[name]
        assert torch.equal(tensor, again.tensors()[name])
    keep = unpack(packed)[1]
    wanted = mask(format, n, k, density, seed)
    if format.pattern == "2:4":  # what is not kept fills up
        assert (keep | ~wanted).all() and keep.sum() == packed.codes.numel() * 2 - padding(packed)
    else:
        assert torch.equal(keep, wanted)


def padding(packed: SparsePacked) -> int:
    """Stored places of 2:4 beyond n or k."""
    beyond = 0
    for t in range(packed.tiles):
        for four in range(packed.places.shape[1]):
            word = int.from_bytes(packed.places[t, four].numpy().tobytes(), "little")
            for r in range(16):
                pair = word >> (r % 2) * 32 + (r // 2) * 4 & 15
                for p in (pair & 3, pair >> 2):
                    beyond += 16 * t + r >= packed.n or 4 * four + p >= packed.k
    return beyond


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ALL), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 140),
       DENSITIES)  # fmt: skip
def test_rows_stack_and_split(format, sizes, k, density):
    whole = random_parts(format, sum(sizes), k, density)
    columns = [[None] * len(sizes) if t is None else t.split(sizes) for t in whole]
    parts = [pack(*given, format) for given in zip(*columns)]
    stacked = stack_rows(parts)
    w = [dequantize(part, torch.float64) for part in parts]
    assert torch.equal(dequantize(stacked, torch.float64), torch.cat(w))
    for mine, expected in zip(split_rows(stacked, sizes), w):
        assert torch.equal(dequantize(mine, torch.float64), expected)


@pytest.mark.parametrize("format", ALL, ids=str)
def test_stacking_what_was_split_copies_nothing(format):
    whole = pack(*random_parts(format, 80, 96, 0.5), format)
    again = stack_rows(split_rows(whole, [16, 16, 48]))
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
        assert name == "starts" or again.tensors()[name].data_ptr() == tensor.data_ptr()
    parts = split_rows(whole, [32, 48])
    swapped = dequantize(stack_rows(parts[::-1]))
    assert torch.equal(swapped, torch.cat([dequantize(part) for part in parts[::-1]]))


@pytest.mark.parametrize("format", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_as_the_dense_matrix_with_its_zeros(format, dtype):
    w = random_weights(format, 50, 170).to(dtype)
    packed = sparse_quantize(w, format)
    if format.is_float:
        expected = w.to(FLOAT_DTYPES[format.values]).double()
    else:
        dense = quantize_weight(w, format.values)
        assert packed.scales.dtype == dense.scales.dtype
        expected = formats.dequantize(dense, torch.float64)
        if not format.symmetric:  # whose zeros are not exact
            expected = expected.where(w != 0, torch.zeros(()))
        assert torch.equal(
            formats.dequantize(sparse_formats.to_dense(packed)), dequantize(packed)
        )
    assert torch.equal(dequantize(packed, torch.float64), expected)


def test_bytes_go_by_what_is_stored(monkeypatch):
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    for name in ("int4-g32", "int4a-g32", "int8-g32"):
        format, dense = SparseFormat.parse(f"block/{name}"), quantize_weight(w, name).nbytes
        for density in (0.1, 0.5, 0.7):
            keep = mask(format, 512, 512, density)
            assert sparse_quantize(w * keep, format).nbytes <= (keep.float().mean() + 0.03) * dense
    dense = quantize_weight(w, "int4-g128").nbytes
    half = random_weights(SparseFormat.parse("2:4/int4-g128"), 512, 512, 1.0)
    assert sparse_quantize(half, "2:4/int4-g128").nbytes < 0.77 * dense  # 3 bits, not 4, and scales
    for density, most in ((0.5, 0.77), (0.3, 0.58)):
        keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < density
        assert sparse_quantize(w * keep, "unstructured/int4-g128").nbytes < most * dense
    # Picked a few tiles at a time, it is the same.
    whole = sparse_quantize(half, "2:4/int4-g128"), sparse_quantize(half, "unstructured/int4-g128")
    monkeypatch.setattr(sparse_formats, "_CHUNK", 512 * 100)
    for packed in whole:
        for name, tensor in sparse_quantize(half, packed.format).tensors().items():
            assert torch.equal(tensor, packed.tensors()[name])


def codes_by_place(n: int, k: int) -> torch.Tensor:
    """Row r, column k has the code (r + k) % 16."""
    return ((torch.arange(n)[:, None] + torch.arange(k)) % 16).to(torch.uint8)


def test_golden_bytes_of_blocks():
    """40 x 96: the blocks 0 and 2 of tile 0, none of tile 1, block 1 of tile 2, as drawn."""
    keep = torch.zeros(40, 96, dtype=torch.bool)
    keep[3, 31] = keep[15, 64] = keep[32, 40] = True
    scales = torch.arange(120).view(40, 3).half()
    packed = pack(codes_by_place(40, 96), keep, scales, -scales, "block/int4a-g32")
    assert packed.starts.numpy().tobytes() == bytes.fromhex(
        "0000000000000000" "0200000000000000" "0200000000000000" "0300000000000000"
    )
    assert packed.places.numpy().tobytes() == bytes.fromhex("00000000" "02000000" "01000000")
    data = packed.codes.numpy().tobytes()
    assert packed.codes.shape == (3, 4, 16, 4)
    # Block 0: row 0 holds k 0..3 in the low and k 4..7 in the high nibbles; then row 1.
    assert data[:8] == bytes.fromhex("40516273" "51627384")
    # Its fourth 64 bytes, k 24..31, row 15: codes 7..14.
    assert data[4 * 64 - 4 : 4 * 64] == bytes.fromhex("b7c8d9ea")
    # Block 2, tile 2, k 32..63: rows 32 to 39, and then padding.
    assert data[512:516] == bytes.fromhex("40516273")
    assert data[512 + 7 * 4 : 512 + 16 * 4] == bytes.fromhex("b7c8d9ea") + bytes(32)
    assert packed.scales[1].tolist() == [3.0 * r + 2 for r in range(16)]
    assert packed.scales[2].tolist() == [3.0 * r + 1 for r in range(32, 40)] + [0.0] * 8
    assert torch.equal(packed.offsets, -packed.scales)


def test_golden_bytes_of_float_blocks():
    w = torch.zeros(17, 40)
    w[16, 33], w[16, 39] = 1.0, -2.0
    packed = sparse_quantize(w, "block/f32")
    assert packed.starts.tolist() == [0, 0, 1] and packed.places.tolist() == [1]
    data = packed.codes.numpy().tobytes()
    assert len(data) == 4 * 512 and packed.scales is None
    assert data[64:68] == bytes.fromhex("0000803f")  # k 33 is the second 16 rows; row 16 the first
    assert data[7 * 64 : 7 * 64 + 4] == bytes.fromhex("000000c0")
    assert sum(byte != 0 for byte in data) == 3
    bf16 = sparse_quantize(w, "block/bf16").codes.view(torch.int16).numpy().tobytes()
    assert bf16[32:34] == bytes.fromhex("803f") and sum(byte != 0 for byte in bf16) == 3


def test_golden_bytes_of_two_in_four():
    """The row that is drawn, in several rows; codes of 8 k."""
    w = torch.zeros(17, 8)
    for row in (0, 1, 5, 14, 16):
        w[row, :4] = torch.tensor([0.0, -3.0, 0.0, 2.0])
    w[2, :4] = torch.tensor([7.0, 0.0, 0.0, 0.0])
    w[3, 4:] = torch.tensor([0.0, 0.0, -8.0, 0.0])
    q, keep = (w + 8).to(torch.uint8), w != 0
    packed = pack(q, keep, torch.ones(17, 1).half(), None, "2:4/int4-g32")
    assert packed.codes.shape == (2, 8, 16) and packed.places.shape == (2, 8, 8)
    codes, places = packed.codes.numpy(), packed.places.numpy()
    assert codes[0, 0].tobytes() == bytes.fromhex("a5a58f88" "88a58888" "88888888" "8888a588")
    # Rows 0 2, 4 6, 8 10, 12 14 and 1 3, 5 7, 9 11, 13 15: 0xd is 1 and 3, 4 is 0 and 1.
    assert places[0, 0].tobytes() == bytes.fromhex("4d4444d4" "4d4d4444")
    assert codes[0, 1].tobytes() == bytes.fromhex("88888808" "88888888" "88888888" "88888888")
    assert places[0, 1].tobytes() == bytes.fromhex("44444444" "84444444")  # 8: 0 and 2
    assert codes[1, 0].tobytes() == bytes.fromhex("a5") + b"\x88" * 15
    assert places[1, 0].tobytes() == bytes.fromhex("4d444444" "44444444")
    assert (codes[:, 2:] == 0x88).all() and (places[:, 2:] == 0x44).all()  # beyond k


def test_golden_bytes_of_a_bitmap():
    q, keep = codes_by_place(17, 10), torch.zeros(17, 10, dtype=torch.bool)
    for i, j in [(0, 0), (0, 3), (1, 1), (15, 3), (2, 4), (0, 8), (0, 9), (15, 9), (16, 2), (16, 9)]:
        keep[i, j] = True
    packed = pack(q, keep, torch.ones(17, 1).half(), None, "unstructured/int4-g32")
    places = packed.places.numpy()
    assert places.shape == (2, 8, 8)
    assert places[0, 0].tobytes() == bytes.fromhex("29" "00000000000080")  # bits 0, 3, 5, 63
    assert places[0, 1].tobytes() == bytes.fromhex("00" "01" "000000000000")  # bit 8
    assert places[0, 2].tobytes() == bytes.fromhex("03" "000000000000" "20")  # 0, 1, 61
    assert places[1, :3].tobytes() == bytes([4, *bytes(7), *bytes(8), 2, *bytes(7)])
    assert not places[:, 3:].any()
    # 4 codes 0 3 2 2; 1 code 6, padded; 3 codes 8 9 8, padded; then tile 1: 2 and 9, padded each.
    assert packed.codes.numpy().tobytes() == bytes.fromhex("3022" "06" "9808" "0209") + bytes(64)
    assert packed.starts.tolist() == [0, 5, 7]


def changed(tensor: torch.Tensor, at, value) -> torch.Tensor:
    copy = tensor.clone()
    copy[at] = value
    return copy


def assert_refused(packed: SparsePacked, match: str, n=None, k=None, **tensors):
    parts = {**packed.tensors(), **tensors}
    parts = {name: tensor for name, tensor in parts.items() if tensor is not None}
    with pytest.raises(FormatError, match=match):
        SparsePacked(packed.format, n or packed.n, k or packed.k, **parts)


@pytest.mark.parametrize("name", ["block/int4-g32", "block/f32"])
def test_hostile_blocks_are_refused(name):
    format = SparseFormat.parse(name)
    keep = torch.zeros(64, 96, dtype=torch.bool)
    keep[0, 0] = keep[0, 64] = keep[32, 0] = keep[32, 32] = keep[48, 95] = True  # 2, 0, 2, 1 blocks
    packed = pack(*random_parts(format, 64, 96, 1.0)[:1], keep, *random_parts(format, 64, 96, 1.0)[2:], format)  # fmt: skip
    starts, places = packed.starts, packed.places
    assert starts.tolist() == [0, 2, 2, 4, 5] and places.tolist() == [0, 2, 0, 1, 2]
    for at, value in [(1, 3), (0, -1), (3, 3), (4, 2**31 - 1), (0, 3)]:
        assert_refused(packed, "places: got", places=changed(places, at, -1 if value == -1 else 3))
    assert_refused(packed, "places: got", places=changed(places, 4, 2**31 - 1))
    assert_refused(packed, "places: must ascend", places=changed(places, 1, 0))  # twice
    assert_refused(packed, "places: must ascend", places=places[[1, 0, 2, 3, 4]])  # unsorted
    assert_refused(packed, "places: must ascend", places=changed(places, 2, 2))
    for bad in (
        [1, 2, 2, 4, 5], [0, 2, 2, 4, 4], [0, 2, 2, 4, 6], [0, 3, 2, 4, 5], [0, 2, 2, -1, 5],
        [0, 2**62, 2, 4, 5], [-1, 2, 2, 4, 5], [0, 2, 2, 6, 5], [0, 2, 2, 4, -(2**63)],
    ):  # fmt: skip
        assert_refused(packed, "starts: must ascend", starts=torch.tensor(bad))
    assert_refused(packed, "places: must ascend", starts=torch.tensor([0, 1, 3, 4, 5]))
    assert_refused(packed, "places: got", k=64)
    assert_refused(packed, "starts: got", n=65)
    assert_refused(packed, "starts: got", starts=starts[:-1])
    assert_refused(packed, "starts: got", starts=starts.int())
    assert_refused(packed, "places: got", places=places.long())
    assert_refused(packed, "codes: got", codes=packed.codes[:-1])
    assert_refused(packed, "codes: got", codes=packed.codes.to(torch.int32))
    assert_refused(packed, "got tensors", places=None)
    assert_refused(packed, "got tensors", offsets=torch.ones(5, 16).half())
    if packed.scales is not None:
        assert_refused(packed, "scales: got", scales=packed.scales[:-1])
        assert_refused(packed, "scales: got", scales=packed.scales.double())
    strided = torch.stack((packed.codes, packed.codes), dim=1)[:, 0]
    assert_refused(packed, "codes: must be contiguous", codes=strided)


def test_hostile_pairs_are_refused():
    packed = pack(*random_parts(SparseFormat.parse("2:4/int4"), 20, 40, 1.0), "2:4/int4")
    for pair in range(16):
        for at in ((0, 0, 0), (1, 15, 7)):  # of the first and of the last row
            for shift in (0, 4):
                byte = int(packed.places[at]) & 15 << (4 - shift) | pair << shift
                places = changed(packed.places, at, byte)
                if pair & 3 < pair >> 2:
                    SparsePacked(packed.format, 20, 40, packed.codes, packed.scales, places=places)
                else:
                    assert_refused(packed, "places: must have p0 < p1", places=places)
    assert_refused(packed, "got tensors", starts=torch.zeros(3, dtype=torch.int64))
    assert_refused(packed, "codes: got|places: got", n=33)
    assert_refused(packed, "codes: got|places: got", k=65)


def test_hostile_bitmaps_are_refused():
    packed = pack(*random_parts(SparseFormat.parse("unstructured/int4"), 20, 37, 0.5), "unstructured/int4")  # fmt: skip
    starts, places, codes = packed.starts, packed.places, packed.codes
    assert starts.shape == (3,)
    assert_refused(packed, "starts: must be", places=changed(places, (0, 0, 0), int(places[0, 0, 0]) ^ 1))
    assert_refused(packed, "starts: must be", places=torch.zeros_like(places))
    for at, value in [(0, 1), (1, 0), (1, 2**62), (1, -1), (2, 0), (2, -(2**63))]:
        assert_refused(packed, "starts: must be", starts=changed(starts, at, value))
    for length in (len(codes) - 1, OVERRUN, 10, 0):
        assert_refused(packed, "codes: got", codes=codes[:length])
    assert_refused(packed, "codes: got", codes=torch.cat((codes, codes)))
    # A bit beyond n, in rows 20 to 31; and beyond k, in the four of k 36 to 39, or a later one.
    for tile, four, bit in [(1, 0, 16), (1, 3, 63), (0, 9, 1), (0, 9, 63), (0, 10, 0), (1, 15, 0)]:
        at = (tile, four, bit // 8)
        bad = changed(places, at, int(places[at]) | 1 << bit % 8)
        assert_refused(packed, "places: has weights beyond the 20x37", places=bad)
    whole = torch.full((1, 8, 8), 255, dtype=torch.uint8)  # all bits of a 16 x 32, counted right
    full = SparsePacked(
        packed.format, 16, 32, torch.zeros(256 + OVERRUN, dtype=torch.uint8),
        torch.ones(1, 1, 16).half(), None, torch.tensor([0, 256]), whole,
    )  # fmt: skip
    assert (dequantize(full) == -8).all()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL), st.data())
def test_fuzz(format, data):
    """Of changed tensors nothing but FormatError comes, or a matrix that can be read."""
    packed = pack(*random_parts(format, 37, 70, 0.5), format)
    parts = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([n for n in parts if n in ("starts", "places")]))
        flat = parts[name].view(-1).view(torch.uint8)
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = SparsePacked(format, 37, 70, **parts)
    except FormatError:
        return
    assert dequantize(found).shape == (37, 70)
    unpack(found)


def test_pack_refuses_what_does_not_fit():
    q, keep, scales, _ = random_parts(SparseFormat.parse("unstructured/int4"), 20, 96, 0.5)
    f32 = torch.randn(20, 96)
    for arguments, error, match in [
        ((q, keep.byte(), scales, None, "unstructured/int4"), TypeError, "keep: got torch.uint8"),
        ((q, keep[:, :95], scales, None, "block/int4-g32"), ValueError, r"keep: got shape \[20, 95\]"),
        ((q, torch.ones_like(keep), scales, None, "2:4/int4"), ValueError, "keep: more than two of 4"),
        ((q.int(), keep, scales, None, "block/int4-g32"), TypeError, "q: got torch.int32"),
        ((q, keep, None, None, "block/f32"), TypeError, "q: got torch.uint8"),
        ((f32, keep, None, None, "block/bf16"), TypeError, "q: got torch.float32"),
        ((f32, keep, scales, None, "block/f32"), ValueError, "scales: got a tensor"),
        ((f32[0], keep, None, None, "block/f32"), ValueError, "q: got shape"),
        ((f32, keep[:19], None, None, "block/f32"), ValueError, "keep: got shape"),
    ]:
        with pytest.raises(error, match=match):
            pack(*arguments)
    for bad in (float("nan"), float("inf")):
        for name in ("block/f32", "block/int4", "unstructured/int4"):
            with pytest.raises(ValueError, match="w: contains NaN or Inf"):
                sparse_quantize(changed(f32, (3, 4), bad), name)
    with pytest.raises(TypeError, match="w: got torch.int64"):
        sparse_quantize(torch.ones(3, 4).long(), "block/f32")
    with pytest.raises(ValueError, match="keep: more than two of 4 .* k = 4 on in .* rows from 16 on"):
        sparse_quantize(changed(torch.zeros(20, 8), (17, slice(5, 8)), 1.0), "2:4/int4")
    with pytest.raises(ValueError, match="packed: got block/f32"):
        sparse_formats.to_dense(sparse_quantize(f32, "block/f32"))


def test_stack_and_split_refuse_what_does_not_fit():
    a, b = (sparse_quantize(torch.ones(16, k), "block/f32") for k in (64, 96))
    c = sparse_quantize(torch.ones(16, 64), "block/bf16")
    for parts in ([a, b], [a, c]):
        with pytest.raises(ValueError, match="parts: got .* expected one kind"):
            stack_rows(parts)
    with pytest.raises(ValueError, match="sizes: got .* the matrix has 16 rows"):
        split_rows(a, [8, 9])


def test_names():
    for format in ALL:
        assert SparseFormat.parse(format.name) == format == SparseFormat.parse(format)
    for alias, name in [
        ("block/int4", "block/int4a-g32"), ("block/int8", "block/int8-g32"),
        ("block/nf4", "block/nf4-g32"), ("block/int2", "block/int2a-g32"),
        ("block/ternary", "block/ternary-g32"), ("2:4/int4", "2:4/int4-g32"),
        ("2:4/nf4", "2:4/nf4-g64"), ("unstructured/int4", "unstructured/int4-g32"),
    ]:  # fmt: skip
        assert SparseFormat.parse(alias).name == name == str(SparseFormat.parse(alias))
    assert [f.bits for f in ALL[5:9]] == [2, 32, 16, 4]


@pytest.mark.parametrize(
    "spec, error",
    [("block", ValueError), ("block/", ValueError), ("int4-g32", ValueError), ("4:8/int4", ValueError),
     ("block/int4-g64", ValueError), ("block/int8-row", ValueError), ("2:4/int4a-g32", ValueError),
     ("2:4/int8", ValueError), ("2:4/f32", ValueError), ("unstructured/int2-g32", ValueError),
     ("unstructured/bf16", ValueError), ("block/f16", ValueError), (4, TypeError), (None, TypeError)],
)  # fmt: skip
def test_unknown_formats_are_refused(spec, error):
    with pytest.raises(error, match="format|pattern|values"):
        SparseFormat.parse(spec)
