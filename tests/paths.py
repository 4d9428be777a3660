"""The ways to compute an operation on this CPU: (implementation, instruction set or None)."""

import pytest

import memlm

PATHS = [("reference", None), *(("cpp", isa) for isa in memlm.isas())]


def path_id(path):
    return "-".join(filter(None, path))


@pytest.fixture(params=PATHS, ids=path_id)
def path(request, restore_isa):
    """Each implementation by name, with its instruction set in use."""
    implementation, isa = request.param
    if isa:
        memlm.set_isa(isa)
    return implementation
