"""The account of a model's layers."""

import json

import pytest
import torch
from torch import nn

import memlm


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "embed": nn.Embedding(50, 64), "norm": nn.LayerNorm(64), "conv": nn.Conv1d(4, 4, 3),
        "hidden": nn.Linear(64, 48), "head": nn.Linear(64, 50, bias=False),
    })  # fmt: skip
    model["head"].weight = model["embed"].weight
    return model


def test_every_module_with_weights_has_its_row(model, restore_isa):
    memlm.quantize_(model, memlm.QuantConfig("int4-g32", "int8-row", mode="accurate"))
    memlm.set_isa("scalar")
    rows = {row.name: row for row in memlm.explain(model).rows}
    assert list(rows) == ["embed", "norm", "conv", "hidden", "head"]
    assert (rows["hidden"].format, rows["hidden"].op) == ("int4-g32", "w4_matmul")
    assert (rows["hidden"].isa, rows["hidden"].mode) == ("scalar", "accurate")
    # 48 rows of 64 codes of 4 bits and 2 f16 scales, and a bias in f32.
    assert rows["hidden"].bytes == 48 * (32 + 2 * 2) + 48 * 4
    assert rows["hidden"].float_bytes == 4 * (48 * 64 + 48)
    # 50 rows are padded to 64.
    assert rows["embed"].bytes == 64 * (64 + 2) and rows["embed"].op == "embedding"
    assert rows["head"].bytes == 0 and "shares" in rows["head"].reason
    assert rows["norm"].reason == "no matrix"
    assert rows["conv"].reason == "memlm has no packed Conv1d"


def test_totals_are_those_of_the_tensors(model):
    memlm.quantize_(model, "int4", lambda module, name: name == "hidden")
    account = memlm.explain(model)
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert account.bytes == sum(tensors.values())
    untouched = nn.ModuleDict({"a": nn.Linear(64, 48)})
    assert memlm.explain(untouched).bytes == memlm.explain(untouched).float_bytes
    assert memlm.explain(untouched).rows[0].reason == "quantize_ was not asked"


def test_shown_as_a_table_and_as_json(model):
    memlm.quantize_(model, "int4")
    account = memlm.explain(model)
    text = str(account)
    assert text.splitlines()[0].split()[:3] == ["layer", "type", "shape"]
    assert "w4_matmul " + memlm.isa() in text and "config: embedding=None" in text
    assert text.splitlines()[-1].startswith("total") and f"{account.bytes:,}" in text
    back = json.loads(json.dumps(account.to_dict()))
    assert back["bytes"] == account.bytes and len(back["rows"]) == 5


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="model: got dict"):
        memlm.explain({})
