"""The benchmarks' harness: what it measures, refuses, writes and draws."""

import copy
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memlm
from benchmarks import (
    bench_block_sparse_matmul, bench_w4_sparse_matmul, harness, matmul, sparse,
)  # fmt: skip
from benchmarks.bench_dequantize import CANDIDATES as DEQUANTIZE
from benchmarks.bench_embedding import CANDIDATES as EMBEDDING
from memlm import limits

W4 = [*matmul.memlm_candidates(["int4-g32"]), *matmul.torch_float(), *matmul.torch_int4()]
W8 = [*matmul.memlm_candidates(["int8-row"]), *matmul.torch_float(), *matmul.torch_int8()]

FIELDS = {
    "op", "impl", "format", "m", "n", "k", "threads", "us", "weight_bytes", "limit_gbps",
    "limit_gops", "error", "version", "date",
}  # fmt: skip
LIMITS = limits.Limits(1, 20.0, 19.0, 50.0, 200.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch, restore_threads):
    monkeypatch.setattr(harness, "ROUNDS", 2)
    monkeypatch.setattr(harness, "SECONDS", 0.0)
    monkeypatch.setattr(harness, "SETTLE", 0.0)
    monkeypatch.setattr(harness, "PATIENCE", 1)
    monkeypatch.setattr(limits, "cache_bytes", lambda: 100_000)
    monkeypatch.setattr(limits, "measure", lambda threads: LIMITS)


def run(op, candidates, *arguments):
    return harness.main(
        harness.MATMULS[op], candidates, "48x64", "1,3", "torch_f32", [str(a) for a in arguments]
    )


@pytest.mark.parametrize("op, candidates", [("w4_matmul", W4), ("w8_matmul", W8)])
def test_lines_of_json(tmp_path, capsys, op, candidates):
    file = tmp_path / "lines.jsonl"
    results = run(op, candidates, "--json", file, "--threads", "1,2")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(results) == 2 * 2 * len(candidates)
    assert all(FIELDS <= line.keys() and line["op"] == op and line["us"] > 0 for line in lines)
    assert {(line["m"], line["n"], line["k"]) for line in lines} == {(1, 48, 64), (3, 48, 64)}
    assert {line["threads"] for line in lines} == {1, 2}
    by_impl = {line["impl"]: line for line in lines}
    assert by_impl["torch_f32"]["weight_bytes"] == 4 * 48 * 64
    assert by_impl["torch_f32"]["limit_gops"] == 50 and by_impl["memlm"]["limit_gops"] == 200
    assert by_impl["memlm"]["isa"] == memlm.isa()
    assert by_impl["memlm"]["version"] == f"memlm {memlm.__version__}"
    assert by_impl["torch_f32"]["version"] == f"torch {torch.__version__}"
    rounding = {"w4_matmul": (0.05, 0.2), "w8_matmul": (0.003, 0.03)}[op]
    assert rounding[0] < by_impl["memlm"]["error"] < rounding[1]
    assert by_impl["torch_f32"]["error"] < 1e-6
    assert len({line["date"] for line in lines}) == 1
    assert "torch_f32 / this" in capsys.readouterr().out
    run(op, candidates, "--json", file, "--impls", "memlm", "--ms", "5", "--shapes", "16x32,32x64")
    added = file.read_text().splitlines()[len(lines):]  # fmt: skip
    assert {(x["impl"], x["m"], x["n"]) for x in map(json.loads, added)} == {
        ("memlm", 5, 16), ("memlm", 5, 32),
    }  # fmt: skip


def test_sparse_benchmarks(tmp_path, monkeypatch):
    """Both operations in one page, one file and one picture; bytes go by what is stored."""
    page = tmp_path / "sparse.md"
    page.write_text(sparse.PAGE.read_text())
    monkeypatch.setattr(sparse, "PAGE", page)
    monkeypatch.setattr(sparse, "RESULTS", tmp_path / "sparse.json")
    sizes = ["--shapes", "64x128", "--ms", "1,3", "--record"]
    bench_block_sparse_matmul.main([*sizes, "--densities", "0.25", "0.5"])
    bench_w4_sparse_matmul.main(sizes)
    recorded = json.loads((tmp_path / "sparse.json").read_text())
    lines = [sparse.Line(**line) for line in recorded["block_sparse_matmul"]]
    assert [(r.format, r.density, r.m) for r in lines[:4]] == [
        ("block/int4a-g32", density, m) for density in (0.25, 0.5) for m in (1, 3)
    ]
    assert len(lines) == 4 * 4 and len(recorded["w4_sparse_matmul"]) == 3 * 2 * 2
    for line in lines:
        assert line.density <= line.bytes_ratio < line.density + 0.03 == line.most_bytes
    dense = [sparse.Line(**line).bytes_ratio for line in recorded["w4_sparse_matmul"]]
    assert 0.5 < min(dense) < max(dense) < 0.9
    rows = page.read_text().splitlines()
    assert sum(row.startswith("| block/") for row in rows) == 8
    assert sum(row.startswith(("| 2:4/", "| unstructured/")) for row in rows) == 6
    assert any(row.startswith("| memlm block/f32 |") for row in rows)
    assert "**0.26** | 0.28 |" in page.read_text()
    assert (tmp_path / "sparse.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "operation, candidates", [(harness.EMBEDDING, EMBEDDING), (harness.DEQUANTIZE, DEQUANTIZE)]
)
def test_other_operations(operation, candidates):
    results = harness.measure(operation, [harness.Case(5, 48, 64)], candidates, [1])
    assert [r.impl for r in results] == [c.impl for c in candidates]
    float_bytes = {"embedding": 5 * 64 * 4, "dequantize": 48 * 64 * 2}[operation.name]
    assert results[-1].weight_bytes == float_bytes


def test_a_wrong_result_is_not_timed():
    wrong = harness.Candidate("zeros", "f32", "f32", 0.5, lambda w: w, lambda x, w: x @ w.T * 0)
    with pytest.raises(AssertionError, match="zeros f32: relative error 1, expected below 0.5"):
        run("w4_matmul", [wrong])


def test_a_rival_that_refuses_is_left_out_and_memlm_is_not(capsys):
    def refuse(w):
        raise RuntimeError("k must be a multiple of 1024")

    rival = harness.Candidate("rival", "x", "f32", 0.5, refuse, None)
    results = run("w4_matmul", [rival, *matmul.torch_float()])
    assert {r.impl for r in results} == {"torch_f32", "torch_bf16"}
    assert "rival x: not for 48x64, m=1: k must be" in capsys.readouterr().err.replace("\n", " ")
    ours = harness.Candidate("memlm", "x", "f32", 0.5, refuse, None)
    with pytest.raises(RuntimeError, match="multiple of 1024"):
        run("w4_matmul", [ours])


def test_only_rivals_that_refuse():
    def refuse(w):
        raise RuntimeError("never")

    rival = harness.Candidate("rival", "x", "f32", 0.5, refuse, None)
    case = harness.Case(1, 48, 64)
    assert harness.measure(harness.MATMULS["w4_matmul"], [case], [rival], [1]) == []


def test_weights_are_cold_and_rivals_interleaved(monkeypatch):
    monkeypatch.setattr(harness, "WAKE", 0)  # one call
    log, made = [], []

    def candidate(name):
        def run(x, w):
            log.append((name, w.data_ptr()))
            return x @ w.T

        return harness.Candidate(name, "f32", "f32", 1e-5, lambda w: made.append(1) or w.clone(), run)

    case = harness.Case(1, 48, 64)
    harness.measure(harness.MATMULS["w4_matmul"], [case], [candidate("a"), candidate("b")], [1])
    assert made == [1, 1]  # copied, not prepared again
    turns = log[-8:]
    assert [name for name, _ in turns] == ["a", "a", "b", "b"] * 2  # to wake up, and to be timed
    size = 48 * 64 * 4
    for name in "ab":
        first = next(pointer for n, pointer in log if n == name)
        assert [pointer == first for n, pointer in turns if n == name] == [True, False] * 2
        # What is timed has a copy that all copies of both were read since.
        pointers = [pointer for n, pointer in log if n == name and pointer != first]
        copies = len(set(pointers))
        assert pointers[:copies] == list(dict.fromkeys(pointers))
        assert pointers[copies:] == pointers[: len(pointers) - copies]
        assert 2 * copies * size > harness.COLD * limits.cache_bytes() > 2 * (copies - 3) * size


def test_a_turn_waits_for_busy_threads(monkeypatch):
    busy = iter([0.0, 0.008, 0.008, 0.018, 0.018, 0.0181])  # before and after each wait
    waits = []
    monkeypatch.setattr(harness, "SETTLE", 0.01)
    monkeypatch.setattr(harness, "PATIENCE", 50)
    monkeypatch.setattr(harness.time, "process_time", lambda: next(busy))
    monkeypatch.setattr(harness.time, "sleep", waits.append)
    harness._settle()
    assert waits == [0.01] * 3


def test_large_results_are_made_of_memory_that_is_there():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("not glibc")
    program = """
import resource, torch
from benchmarks import harness
harness._keep_memory()
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[15], resource.getpagesize())
"""
    root = str(Path(__file__).parent.parent)
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    faults, page = map(int, ran.stdout.split())
    assert faults < (4 << 24) / page / 100


def test_torch_engines():
    w, x = torch.randn(48, 64), torch.randn(3, 64)
    before = torch.backends.quantized.engine
    names = {}
    for candidate in matmul.torch_int8():
        if candidate.arithmetic == "i8":
            stored = copy.deepcopy(candidate.prepare(w))
            names[candidate.impl] = stored.engine
            error = (candidate.run(x, stored) - x @ w.T).norm() / (x @ w.T).norm()
            assert 0.001 < error < 0.03
    assert names == {"torch_fbgemm_int8": "fbgemm", "torch_onednn_int8": "onednn"}
    assert torch.backends.quantized.engine == before


def test_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    run("w4_matmul", W4, "--plot", tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--impls", "cublas"), "['cublas'] not known"),
        (("--shapes", "12"), "expected NxK"),
        (("--shapes", "0x4"), "expected NxK"),
        (("--ms", "0"), "numbers from 1"),
        (("--threads", "x"), "--threads"),
        (("--impls", "torch_f32", "--formats", "int4-g32"), "nothing to measure"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        run("w4_matmul", W4, *arguments)
    assert message in capsys.readouterr().err
