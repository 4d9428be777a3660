"""The generated page of results."""

import json
from dataclasses import asdict

import pytest

from benchmarks import page
from benchmarks.harness import Measurement


def row(**changes) -> dict:
    values = {
        "op": "w4_matmul", "impl": "memlm", "format": "int4-g32", "m": 1, "n": 64, "k": 32,
        "threads": 2, "us": 20.0, "weight_bytes": 1152, "limit_gbps": 30.0, "limit_gops": 400.0,
        "macs": 2048, "arithmetic": "i8", "isa": "avx2", "device": "CPU (TM) 1", "memlm": "0.1",
        "torch": "2.13", "commit": "abc", "error": 0.0823, "version": "memlm 0.1",
        "date": "2026-11-25T10:00:00+00:00",
    }  # fmt: skip
    assert values.keys() == asdict(Measurement(**values)).keys()
    return {**values, **changes}


def old(**changes) -> dict:
    """A line as it was before errors, versions and dates were recorded."""
    line = row(**changes)
    for field in ("error", "version", "date"):
        del line[field]
    return line


RIVAL = {"impl": "rival", "format": "q4", "version": "rival 7", "arithmetic": "f32"}
LINES = [
    row(us=77.0),  # an older run of the same device
    row(date="2026-11-26T00:00:00+00:00"),
    row(date="2026-11-26T00:00:00+00:00", m=4, us=1234.0, error=0.081),
    row(date="2026-11-26T00:00:00+00:00", us=10.0, limit_gops=50.0, **RIVAL),
    row(date="2026-11-26T00:00:00+00:00", m=4, us=2468.0, limit_gops=50.0, **RIVAL),
    old(device="Other", commit="old"),
    old(device="Other", commit="old", op="embedding", us=3.0, unknown_field=1),
]


@pytest.fixture
def folder(tmp_path):
    for name, lines in (("a", LINES[:5]), ("b", LINES[5:])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def written(folder) -> str:
    page.main(["--results", str(folder), "--page", str(folder / "docs" / "results.md")])
    return (folder / "docs" / "results.md").read_text()


def test_tables(folder):
    text = written(folder)
    assert "| memlm | int4-g32 | 4.50 | 0.081 | 20.0 (1.00) | **1,234** (1.00) |" in text
    assert "| rival | q4 | 4.50 | 0.082 | **10.0** (0.50) | 2,468 (2.00) |" in text
    assert "2026-11-26 00:00 UTC, commit abc, kernels for avx2" in text
    assert "2 threads: memory 30.0 GB/s, f32 50 GMAC/s, i8 400 GMAC/s" in text
    assert "Versions: memlm 0.1, torch 2.13, rival 7." in text
    assert "77.0" not in text  # only the newest run


def test_lines_of_older_versions(folder):
    text = written(folder).split("## Other\n")[1]
    assert "date not recorded, commit old" in text
    assert "| memlm | int4-g32 | 4.50 |  | **20.0** (1.00) |" in text
    assert "### embedding\n" in text
    assert "| memlm | int4-g32 |  |  | **3.0** (1.00) |" in text


def test_pictures(folder):
    pytest.importorskip("matplotlib")
    text = written(folder)
    for name in ("cpu-tm-1", "other"):
        for what in ("ratios", "roofline"):
            file = f"{name}-w4_matmul-{what}.png"
            assert f"](results/{file})" in text
            assert (folder / "docs" / "results" / file).read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "docs" / "results").iterdir())) == 4  # none of embedding


def test_no_results(tmp_path, capsys):
    with pytest.raises(SystemExit):
        page.main(["--results", str(tmp_path)])
    assert "no measurements" in capsys.readouterr().err
