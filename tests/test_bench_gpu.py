"""benchmarks/bench_gpu.py on the CPU, whose kernels stand for the GPU's: what it compares, refuses, writes."""

import json
import sys

import pytest
import torch

from benchmarks import bench_gpu
from benchmarks.bench_gpu import Call, Cpu

PROBLEMS = {
    **{
        op: lambda op=op, format=format: bench_gpu.matmul(op, format, 3, 64, 256, "cpu")
        for op, format in (
            ("w2_matmul", "int2a-g64"), ("w4_matmul", "int4-g128"), ("w8_matmul", "int8-row"), ("w8a8_matmul", "int8-row")
        )
    },
    "attention": lambda: bench_gpu.attention(64, 4, 2, 32, "cpu"),
    "paged bf16": lambda: bench_gpu.paged_attention("bf16", 2, 128, 4, 2, 32, "cpu"),
    "paged int4": lambda: bench_gpu.paged_attention("int4", 2, 128, 4, 2, 32, "cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name):
    """Arguments are in their places: the result is near what it is compared with."""
    problem = PROBLEMS[name]()
    rows = bench_gpu.measured(problem, Cpu(), (1.0, 1.0), 2)
    assert [row["impl"] for row in rows] == list(problem.calls) and "memlm cpp" in problem.calls
    for row in rows:
        assert row["us"] > 0 and row["error"] < problem.error, row
        assert row["of_limit"] == max(problem.bytes, problem.macs) / row["us"]


def test_wrong_results_are_not_timed():
    problem = PROBLEMS["w4_matmul"]()
    problem.calls["memlm cpp"] = Call(lambda: torch.zeros_like(problem.exact))
    with pytest.raises(AssertionError, match="memlm cpp w4_matmul int4-g128 64x256, m=3: relative error 1, expected"):
        bench_gpu.measured(problem, Cpu(), (1.0, 1.0), 2)


def test_rivals_that_refuse_are_left_out(capsys):
    problem = PROBLEMS["w4_matmul"]()

    def refuses():
        raise RuntimeError("not on this device")

    problem.calls["marlin"] = Call(refuses)
    assert all(row["impl"] != "marlin" for row in bench_gpu.measured(problem, Cpu(), (1.0, 1.0), 2))
    assert "marlin: not for w4_matmul int4-g128 64x256, m=3: not on this device" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    with pytest.raises(SystemExit, match="there is no GPU that this torch can use"):
        bench_gpu.main()


def test_recorded(monkeypatch, tmp_path):
    """Results, and the page, with what they depend on."""
    page, results = tmp_path / "gpu.md", tmp_path / "gpu.json"
    page.write_text(f"before\n{bench_gpu.BEGIN}old{bench_gpu.END}after\n")
    monkeypatch.setattr(bench_gpu, "PAGE", page)
    monkeypatch.setattr(bench_gpu, "PICTURE", tmp_path / "gpu.png")
    monkeypatch.setattr(bench_gpu, "RESULTS", results)
    monkeypatch.setattr(bench_gpu, "Gpu", Cpu)
    monkeypatch.setattr(bench_gpu, "problems", lambda device: [("w4_matmul", PROBLEMS["w4_matmul"])])
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--record"])
    for runs in (1, 2):
        bench_gpu.main()
        kept = json.loads(results.read_text())
        assert len(kept) == runs and {"device", "driver", "torch", "commit", "date", "rows"} <= kept[-1].keys()
    assert (tmp_path / "gpu.png").stat().st_size > 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| w4_matmul | int4-g128 64x256, m=3 | memlm cpp |" in text
