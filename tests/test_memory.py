"""Resident memory by part, against the kernel's own accounting.  Each case is a process of its own:
another test's memory would count as the rest."""

import json
import subprocess
import sys

import pytest

import memlm

MB = 1 << 20
# What the kernel's counters, read one after the other, and malloc's small blocks may differ by.
TOLERANCE = 2 * MB

SETUP = """
import json, sys, torch, memlm
from memlm import memory
from memlm.models.load import build

MB = 1 << 20
CONFIG = dict(
    model_type="llama", vocab_size=8192, hidden_size=512, intermediate_size=1536,
    num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    max_position_embeddings=2048, tie_word_embeddings=True,
)

def made():
    model = build(CONFIG).to_empty(device="cpu").eval()
    model.lm_head.weight = model.embed_tokens.weight  # to_empty unties them
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.hf_config = CONFIG
    return model

def rollup(field):
    with open("/proc/self/smaps_rollup") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith(field + ":"))

def of_file(path, field):
    total, inside = 0, False
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if not head.endswith(":"):
            inside = line.rstrip().endswith(path)
        elif inside and head == field + ":":
            total += int(line.split()[1]) * 1024
    return total

def run(model, cache=None, ids=None):
    with torch.inference_mode():
        return model(torch.zeros(1, 300, dtype=torch.int64) if ids is None else ids, cache)
"""
WEIGHT_BYTES = 4 * (8192 * 512 + 4 * (512 * (1024 + 512) + 3 * 512 * 1536 + 2 * 512) + 512)


def measured(code, *arguments):
    """What the code printed as JSON."""
    command = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "int8"
    measured(
        "memlm.save(memlm.quantize_(made(), memlm.QuantConfig('int8', 'int8')), sys.argv[1])\n"
        "print('{}')",
        folder,
    )
    return folder


def test_float_weights_are_private_and_parts_add_up():
    found = measured(
        "run(made(), made().new_cache()); base = memory.baseline()\n"
        "model = made(); cache = model.new_cache(); run(model, cache)\n"
        "before = memory.account(base, model, cache)\n"
        "other = torch.ones(64 * MB // 4)\n"
        "after = memory.account(base, model, cache)\n"
        "print(json.dumps([before.to_dict(), after.to_dict(), after.resident, rollup('Rss'),\n"
        "    cache.nbytes]))"
    )
    before, after, resident, rss, cache_bytes = found
    assert before["private_weights"] == WEIGHT_BYTES and before["mapped_weights"] == 0
    # 5 of 8 blocks of 64 tokens were written to, the last one in part.
    written = cache_bytes * 300 // 512
    assert written <= before["kv_cache"] <= cache_bytes
    assert abs(resident - rss) < TOLERANCE
    assert abs(after["rest"] - before["rest"] - 64 * MB) < TOLERANCE
    for part in ("mapped_weights", "private_weights", "kv_cache"):
        assert after[part] == before[part]


def test_known_parts_explain_all_of_it(packed):
    """What is left unexplained is what malloc holds back of the run's temporary buffers, and at
    most as much as they were."""
    found = measured(
        "load = memlm.load; load(sys.argv[1]); base = memory.baseline()\n"
        "memory.reset_peak(); loaded = load(sys.argv[1])\n"
        "account = memory.account(base, loaded)\n"
        "print(json.dumps([account.to_dict(), rollup('Rss')]))",
        packed,
    )
    account, rss = found
    known = account["mapped_weights"] + account["private_weights"] + account["torch_python"]
    assert abs(rss - known) < TOLERANCE and account["temporary"] < TOLERANCE


def test_mapped_weights_are_what_smaps_says_of_the_file(packed):
    found = measured(
        "base = memory.baseline(); model = memlm.load(sys.argv[1])\n"
        "few = memory.account(base, model).mapped_weights\n"
        "run(model); account = memory.account(base, model)\n"
        "path = sys.argv[1] + '/model.safetensors'\n"
        "clean = account.mapped_weights, of_file(path, 'Rss'), of_file(path, 'Anonymous')\n"
        "model.layers[0].mlp.down_proj.codes.fill_(1)\n"
        "account = memory.account(base, model)\n"
        "dirty = account.mapped_weights, account.private_weights\n"
        "print(json.dumps([few, clean, dirty, of_file(path, 'Rss'), of_file(path, 'Anonymous')]))",
        packed,
    )
    few, (mapped, rss, copied), (still_mapped, private), rss_after, copied_after = found
    size = (packed / "model.safetensors").stat().st_size
    assert mapped == rss and copied == 0
    assert 0 <= size - few and size - 4096 < mapped <= size + 4096
    assert copied_after >= 512 * 1536 and private == copied_after
    assert still_mapped == rss_after - copied_after


def test_peak_of_a_run():
    found = measured(
        "base = memory.baseline(); model = made()\n"
        "torch.ones(300 * MB // 4); memory.reset_peak()\n"
        "start = memory.peak_bytes(), memory.resident_bytes()\n"
        "torch.ones(200 * MB // 4)\n"
        "account = memory.account(base, model)\n"
        "print(json.dumps([start, account.to_dict(), account.peak, memory.peak_bytes()]))"
    )
    (peak_before, resident), account, total, peak = found
    assert abs(peak_before - resident) < TOLERANCE
    assert abs(account["temporary"] - 200 * MB) < TOLERANCE
    assert abs(total - peak) < TOLERANCE


def test_freed_blocks_are_returned():
    """Blocks of 1 MB freed below one that lives on: glibc keeps them, once it has seen a larger one
    freed, unless told otherwise."""
    code = (
        "returned = memory.return_freed() if sys.argv[1] == 'return' else False\n"
        "torch.ones(30 * MB // 4); before = memory.resident_bytes()\n"
        "blocks = [torch.ones(MB // 4) for _ in range(60)]; last = blocks.pop(); blocks.clear()\n"
        "print(json.dumps([returned, memory.resident_bytes() - before]))"
    )
    _, kept = measured(code, "keep")
    returned, left = measured(code, "return")
    assert returned and kept > 50 * MB and left < 3 * MB


def test_info_and_bench_report_it(packed):
    code = "from memlm.cli import main; main()"
    for command in (("info",), ("bench", "--threads", "1")):
        done = subprocess.run(
            [sys.executable, "-c", code, *command, str(packed), "--json", "-"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["memory"]
        assert set(found) == set(memlm.memory.Account.__dataclass_fields__)
        assert 50 * MB < found["torch_python"] < 2000 * MB
    weights = (packed / "model.safetensors").stat().st_size
    assert abs(found["mapped_weights"] - weights) < 2 * 4096 and found["private_weights"] == 0
    # 512 tokens: two of the cache's steps, all written.
    assert found["kv_cache"] == 4 * 2 * 4 * 64 * 512 * 4
