"""Every test runs with uninitialised memory filled with NaN: what a kernel forgets to write shows."""

import pytest
import torch

from .paths import path  # noqa: F401  (a fixture)


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


@pytest.fixture
def restore_isa():
    import memlm

    isa = memlm.isa()
    yield
    memlm.set_isa(isa)
