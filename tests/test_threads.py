"""Threads under the kernels: the same bits from any number, from several callers, in forked
children; with torch's pool and with memlm's own."""

import subprocess
import sys
import threading

import pytest
import torch

from memlm import ops
from memlm.cpu import lib_path

from . import tiny
from .matmul_checks import random_case
from .test_packaging import ROOT

TIMEOUT = 120  # seconds: what hangs fails


def run_script(script: str) -> str:
    """What a new Python process prints that runs ``script``."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# So large that every number of threads is used, also for one row of x.
N, K = 1100, 1000


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "accurate"])
@pytest.mark.parametrize("format", ["int4-g32", "int4a-g64", "int8-g32", "int8-row"])
def test_same_bits(format, fast, restore_threads):
    x, packed, bias = random_case(format, N, K, 70, torch.float32)
    mode, ids = "fast" if fast else "accurate", torch.arange(0, N, 3)
    results = []
    for threads in (1, 2, 3, 8, 1):
        torch.set_num_threads(threads)
        results.append(
            [ops.matmul(x[:m], packed, bias, mode) for m in (1, 7, 70)]
            + [ops.embedding(ids, packed), ops.dequantize(packed)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_several_callers(restore_threads):
    torch.set_num_threads(2)
    x, packed, bias = random_case("int4-g32", N, K, 20, torch.float32)
    expected = [ops.matmul(x[:m], packed, bias) for m in (1, 20)]
    right = []

    def call():
        torch.set_num_threads(2)  # a thread's own setting
        for _ in range(20):
            for m, y in zip((1, 20), expected):
                right.append(torch.equal(ops.matmul(x[:m], packed, bias), y))

    callers = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(TIMEOUT)
    assert right == [True] * 160


def test_denormals_are_flushed_on_every_thread_or_on_none(restore_threads):
    x, packed, _ = random_case("int8-g32", 20000, 256, 1, torch.float32)
    x = torch.full_like(x, 1e-40)
    torch.set_num_threads(3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        flushed = [ops.matmul(x, packed, mode="accurate") for _ in range(5)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(y, torch.zeros(1, 20000)) for y in flushed)
    kept = [ops.matmul(x, packed, mode="accurate") for _ in range(5)]
    assert (kept[0] != 0).double().mean() > 0.9
    assert all(torch.equal(y, kept[0]) for y in kept)


# A process whose pool is awake; check() computes, and fails where the result is another.
AWAKE = f"""
import multiprocessing, os, signal, threading
import torch, memlm
from memlm import ops
torch.set_num_threads(3)
torch.manual_seed(0)
packed, x = memlm.quantize_weight(torch.randn({N}, {K}), "int4"), torch.randn(20, {K})
expected = [ops.matmul(x[:m], packed) for m in (1, 20)]
torch.mm(torch.randn(300, 300), torch.randn(300, 300))

def check():
    for m, y in zip((1, 20), expected):
        assert torch.equal(ops.matmul(x[:m], packed), y)
    ops.dequantize(packed)
"""

FORK = """
def child():
    signal.alarm(60)
    check()

def fork():
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the child hung or failed"
"""


def test_fork():
    assert run_script(AWAKE + FORK + """
for _ in range(3):
    check()
    fork()
check()
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0
check()
print("done")
""") == "done\n"  # fmt: skip


def test_fork_while_another_thread_computes():
    assert run_script(AWAKE + FORK + """
stop = False

def call():
    while not stop:
        check()

other = threading.Thread(target=call)
other.start()
for _ in range(5):
    fork()
stop = True
other.join()
print("done")
""") == "done\n"  # fmt: skip


GENERATE = """
from memlm.models.generate import generate
model = memlm.quantize_(memlm.load(sys.argv[1]), memlm.QuantConfig("int4", "int8", "int8"))
tokens = list(generate(model, [5, 200, 31], 20))

def check():
    torch.set_num_threads(3)  # a thread's own setting
    assert list(generate(model, [5, 200, 31], 20)) == tokens
"""


def test_whole_layers_from_several_threads_and_in_children(tmp_path):
    """A team holds the host's threads for the time of a call; others' calls go on without."""
    tiny.llama(tmp_path, hidden_size=256, intermediate_size=1024)
    script = f"import sys; sys.argv.append({str(tmp_path)!r})" + AWAKE + GENERATE + FORK + """
def call():
    for _ in range(5):
        check()
    done.append(True)

done = []
callers = [threading.Thread(target=call) for _ in range(3)]
for caller in callers:
    caller.start()
fork()
for caller in callers:
    caller.join()
assert done == [True] * 3
fork()
check()
print("done")
"""  # fmt: skip
    assert run_script(script) == "done\n"


def test_set_num_threads_is_followed():
    """What a host is asked for: as many tasks as torch has threads; none for little work."""
    counts = run_script(AWAKE + """
import ctypes
from memlm.cpu import lib_path
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
counts = []
small = memlm.quantize_weight(torch.randn(100, 100), "int4")

@ctypes.CFUNCTYPE(None, ctypes.c_int64, TASK, ctypes.c_void_p)
def run(count, task, context):
    counts.append(count)
    for i in range(count):
        task(context, i)

ctypes.CDLL(lib_path()).memlm_set_run(run)
for threads in (2, 1, 3, 8):
    torch.set_num_threads(threads)
    assert torch.equal(ops.matmul(x[:1], packed), expected[0])
ops.matmul(torch.randn(1, 100), small)
print(counts)
""")
    assert counts == "[2, 3, 8]\n"


def test_exit_while_workers_sleep():
    script = AWAKE + "import time; time.sleep(0.1); check(); time.sleep(0.1); print('done')"
    assert run_script(script) == "done\n"


# memlm's own pool through the C ABI alone.
C_ABI = f"""
import ctypes, os, signal, sys, time
import _ctypes

class Packed(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "offsets")]
    _fields_ += [("scale_dtype", ctypes.c_int)]
    _fields_ += [(name, ctypes.c_int64) for name in ("n", "k", "group")]
    _fields_ += [("levels", ctypes.c_void_p)]
    _fields_ += [("pattern", ctypes.c_int), ("starts", ctypes.c_void_p), ("places", ctypes.c_void_p)]

N, K = 6400, 128
lib = ctypes.CDLL({str(lib_path())!r})
codes = ctypes.create_string_buffer(b"\\x03" * (N * K), N * K)
scales = (ctypes.c_float * (N * K // 32))(*[2.0] * (N * K // 32))
w = Packed(ctypes.addressof(codes), ctypes.addressof(scales), None, 0, N, K, 32)
out = (ctypes.c_float * (N * K))()

def check(threads):
    ctypes.memset(out, 0xFF, ctypes.sizeof(out))
    status = lib.memlm_dequantize(
        ctypes.byref(w), 8, ctypes.c_int64(0), ctypes.c_int64(N), 0, out, threads)
    assert status == 0 and out[:] == [6.0] * (N * K)

for threads in (2, 8, 1, 3):
    check(threads)
assert "torch" not in sys.modules and len(os.listdir("/proc/self/task")) == 8
"""


def test_own_pool():
    assert run_script(C_ABI + FORK.replace("check()", "check(3)") + """
fork()
check(3)
time.sleep(0.1)
check(3)
print("done")
""") == "done\n"  # fmt: skip


def test_own_pool_outlives_dlclose():
    assert run_script(C_ABI + """
_ctypes.dlclose(lib._handle)
time.sleep(0.1)
assert "libmemlm.so" in open("/proc/self/maps").read()
print("done")
""") == "done\n"  # fmt: skip
