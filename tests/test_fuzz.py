"""The readers of files on inputs that lie: random changes of sound files, and what fuzzing found."""

import random
from pathlib import Path

import pytest

from fuzz import readers

FUZZ = Path(__file__).parents[1] / "fuzz"


@pytest.fixture(scope="module", params=readers.READERS)
def reader(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    folder.mkdir()
    readers.surroundings(request.param, folder)
    return request.param, folder


def outcome(name, folder, data):
    """True: read; False: refused as it should be.  Everything else fails the test."""
    try:
        readers.READERS[name](folder, data)
        return True
    except readers.REFUSALS:
        return False


def changed(data: bytes, random: random.Random) -> bytes:
    """A few bytes set, cut out, put in, or copied to another place."""
    made = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, length = random.randrange(len(made) or 1), random.choice([1, 1, 1, 2, 4, 8, 30])
        kind = random.randrange(5)
        if kind == 0:
            made[at : at + length] = random.randbytes(length)
        elif kind == 1:
            made[at : at + length] = random.choice([b"\0", b"\xff"]) * length
        elif kind == 2:
            del made[at : at + length]
        elif kind == 3:
            made[at:at] = random.choice(
                [b"-", b"9" * 12, b"[" * 30, b"null", b"{}", b"1e999", b"\\ud800"]
            )
        else:
            start = random.randrange(len(made) or 1)
            made[at : at + length] = made[start : start + length]
    return bytes(made)


def test_changed_files(reader):
    name, folder = reader
    seeds, rng = readers.seeds(name), random.Random(0)
    assert all(outcome(name, folder, seed) for seed in seeds[:1])
    read = 0
    for i in range(150):
        seed = rng.choice(seeds)
        # Headers are at the front: most of the changes go there.
        head = seed if rng.random() < 0.3 else seed[:600]
        read += outcome(name, folder, changed(head, rng) + seed[len(head) :])
    assert read < 150


def test_cut_files(reader):
    name, folder = reader
    seed = readers.seeds(name)[0]
    for end in sorted({*range(0, 40), *range(40, len(seed), max(1, len(seed) // 60))}):
        assert outcome(name, folder, seed[:end]) is False, end


def test_corpus_and_findings(reader):
    """Inputs by which fuzzing reached new places in the readers, and what it found once: read or
    refused, but never again a crash."""
    name, folder = reader
    files = [file for kind in ("corpus", "findings") for file in (FUZZ / kind / name).glob("*")]
    assert files
    for file in sorted(files):
        outcome(name, folder, file.read_bytes())
