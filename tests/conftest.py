"""Every test runs with uninitialised memory filled with NaN: what a kernel forgets to write shows."""

import os

# Before anything imports Triton, which reads it once: its kernels are interpreted (tests/triton_interpreter.py),
# unless a GPU runs them.
if not os.environ.get("MEMLM_TEST_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import memlm

from .paths import path  # noqa: F401  (a fixture)


os.environ["COLUMNS"] = "200"  # of tables, which hold paths of temporary folders


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def restore_isa():
    isa = memlm.isa()
    yield
    memlm.set_isa(isa)
