"""docs/gpu.md says what there is."""

from . import gpu_operations


def test_up_to_date():
    assert gpu_operations.table() in gpu_operations.PAGE.read_text()
