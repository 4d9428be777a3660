"""The machine's limits are those of a machine, and the process's memory is accounted for."""

import mmap

import pytest

from memlm import limits, memory


def test_limits_are_plausible():
    found = limits.measure(1)
    assert 0.5 < found.dram_gbps < 2000 and 0.5 < found.dram_gbps_small_pages < 2000
    # A multiply-add of one 8-bit pair costs no more than one of an f32 pair.
    assert 1 < found.f32_gmacs < 1.2 * found.i8_gmacs < 20_000
    assert found.threads == 1 and found.to_dict()["dram_gbps"] == found.dram_gbps


def test_threads_must_be_there():
    with pytest.raises(ValueError, match="threads: got 0"):
        limits.measure(0)


def test_cache_and_name():
    assert 1 << 18 <= limits.cache_bytes() <= 1 << 33
    assert limits.cpu_name()


def test_resident_bytes_follow_what_is_touched():
    with mmap.mmap(-1, 64 << 20) as block:  # new pages; malloc might hand out old ones
        before = memory.resident_bytes()
        for page in range(0, len(block), 4096):
            block[page] = 1
        assert memory.resident_bytes() - before > 60 << 20


def test_file_mappings(tmp_path):
    path, size = tmp_path / "file", 1 << 20
    path.write_bytes(b"x" * size)
    assert memory.file_mapping(path) == memory.Mapping()
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            sum(mapped[::4096])
            found = memory.file_mapping(path)
            assert (found.size, found.resident, found.private) == (size, size, 0)
            mapped[0] = 0
            assert memory.file_mapping(path).private == 4096
