"""docs/isas.md is what the tests that it speaks of say."""

from . import isa_table


def test_up_to_date():
    assert isa_table.FILE.read_text().startswith(isa_table.table())
