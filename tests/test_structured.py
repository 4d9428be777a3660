"""Structured removal against the whole model with the same parts set to zero, and against the
least-squares solution in f64."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import memlm
from memlm.export import export
from memlm.models.generate import generate
from memlm.prune import remove_, structured

from . import tiny
from .numerics import ROUNDOFF, assert_within

# Logits are of order 1 to 10; f32 rounding through a few layers of sums of up to 112 terms.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2 window": {
        "cls": Qwen2ForCausalLM,
        "config": Qwen2Config,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
        "num_hidden_layers": 4,
    },
    "qwen3": {"cls": Qwen3ForCausalLM, "config": Qwen3Config, "head_dim": 24},
}


def ids_of(*shape, seed=1):
    return torch.randint(256, shape, generator=torch.manual_seed(seed))


def calibration():
    return [ids_of(2, 60, seed=2), ids_of(1, 90, seed=3)]


def masked(model, removal):
    """The model with the columns zero that read what was removed: what removal has to equal."""
    model = copy.deepcopy(model)
    stay = [layer for i, layer in enumerate(model.layers) if i not in removal.layers]
    model.layers = nn.ModuleList(stay)
    with torch.no_grad():
        for part in removal.parts:
            weight = model.get_submodule(part.name).weight
            groups = weight.view(len(weight), part.of, -1)
            gone = [i for i in range(part.of) if i not in part.kept]
            assert gone
            groups[:, gone] = 0
    return model


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_model_with_the_same_parts_zero(tmp_path, settings):
    theirs = tiny.llama(tmp_path, **settings)
    model = memlm.load(tmp_path)
    before, config = copy.deepcopy(model), model.config
    last = [config.layers - 1] if config.layers > 2 else []
    sizes = {"heads": 0.5, "channels": 0.4, "layers": [*last, 0]}
    removal = remove_(model, calibration(), **sizes, compensate=False)
    c = model.config
    assert (c.kv_heads, c.heads, c.head_dim) == (config.kv_heads // 2, 2, config.head_dim)
    assert (c.layers, c.intermediate_size) == (config.layers - 1 - len(last), 96)
    assert c.windows == tuple(w for i, w in enumerate(config.windows) if i not in (0, *last))
    assert removal.parameters == sum(p.numel() for p in model.parameters()) < removal.before

    ids = ids_of(2, 100)
    with torch.inference_mode():
        result = model(ids)
        torch.testing.assert_close(result, masked(before, removal)(ids), **CLOSE)
        assert (result - before(ids)).abs().max() > 0.1
        cache = model.new_cache()
        parts = [model(part, cache) for part in ids.split([70, 1, 29], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), result, **CLOSE)

        memlm.save(model, tmp_path / "small")
        torch.testing.assert_close(memlm.load(tmp_path / "small")(ids), result, **CLOSE)
        again = type(theirs).from_pretrained(tmp_path / "small")
        torch.testing.assert_close(again(ids).logits, result, **CLOSE)


def test_what_is_left_is_a_model_like_any_other(tmp_path):
    """Quantised, generated from, exported to GGUF."""
    tiny.llama(tmp_path)
    tiny.tokenizer(tmp_path)
    model = memlm.load(tmp_path)
    remove_(model, calibration(), heads=1, channels=16)
    memlm.save(model, tmp_path / "small")
    export(tmp_path / "small", tmp_path / "small.gguf", "gguf")
    ids = ids_of(1, 40)
    with torch.inference_mode():
        expected = model(ids)
        torch.testing.assert_close(memlm.load(tmp_path / "small.gguf")(ids), expected, **CLOSE)
        memlm.quantize_(model, memlm.QuantConfig("int8", "int8", "int8"), strict=True)
        dense, cached = model(ids), model(ids, model.new_cache())
    torch.testing.assert_close(cached, dense, **CLOSE)
    assert (dense - expected).norm() < 0.05 * expected.norm()
    tokens = list(generate(model, ids[0].tolist(), 5))
    assert len(tokens) == 5


def gram_of(model, layer, ids):
    """In f64, of what one linear layer is given."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.inference_mode():
        for batch in ids:
            model(batch)
    hook.remove()
    rows = torch.cat([x.flatten(0, -2) for x in seen]).double()
    return rows.T @ rows, rows.abs().T @ rows.abs(), len(rows)


@pytest.mark.parametrize("what, name", [("heads", "layers.0.attention.o_proj"),
                                        ("channels", "layers.0.mlp.down_proj")])  # fmt: skip
def test_the_update_is_the_least_squares_solution(tmp_path, what, name):
    """The normal equations of the damped problem, to the rounding of f32 sums; and the error that
    is reported is that of the weights."""
    tiny.llama(tmp_path, num_hidden_layers=1)
    model = memlm.load(tmp_path)
    gram, sizes, tokens = gram_of(model, name, calibration())
    before = model.get_submodule(name).weight.detach().double()
    (part,) = remove_(model, calibration(), **{what: 1 if what == "heads" else 50}).parts
    after = model.get_submodule(name).weight.detach().double()
    k = len(gram)
    stay = torch.tensor(part.kept)[:, None] * (k // part.of) + torch.arange(k // part.of)
    stay = stay.flatten()
    assert after.shape == (64, len(stay))

    squares = gram.diagonal()
    damped = gram + torch.diag(0.5 * squares + 1e-5 * (squares + squares.mean()))
    u = ROUNDOFF[torch.float32]
    off = 1.6 * 5 * math.sqrt(tokens) * u * sizes  # of the Gram matrix, summed in f32
    bound = before.abs() @ off[:, stay] + after.abs() @ off[stay][:, stay]
    bound += u * after.abs() @ damped[stay][:, stay].abs()  # the result is rounded to f32
    assert_within(after @ damped[stay][:, stay], before @ damped[:, stay], bound)

    change = before.clone()
    change[:, stay] -= after
    lost = (((change @ gram) * change).sum() / ((before @ gram) * before).sum()).sqrt()
    assert part.error == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("choose", [structured._with_update, structured._without_update])
def test_the_group_that_leaves_is_the_one_that_costs_least(size, choose):
    """Every group tried in turn."""
    generator = torch.manual_seed(size)
    groups, n = 8, 5
    k = groups * size
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    gram = mix @ mix.T + 0.1 * torch.eye(k, dtype=torch.float64)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)

    def cost(group):
        stay = [i for i in range(k) if i // size != group]
        change = weight.clone()
        if choose is structured._with_update:
            change[:, stay] -= torch.linalg.solve(gram[stay][:, stay], gram[stay] @ weight.T).T
        else:
            change[:, stay] = 0
        return float(((change @ gram) * change).sum())

    costs = [cost(group) for group in range(groups)]
    kept, new = choose(weight, gram, groups, 1)
    (gone,) = set(range(groups)) - set(kept.tolist())
    assert gone == min(range(groups), key=costs.__getitem__)
    change = weight.clone()
    change[:, [i for i in range(k) if i // size != gone]] -= new
    assert float(((change @ gram) * change).sum()) == pytest.approx(costs[gone], rel=1e-9)


def test_many_rounds_lose_no_more_than_the_choice_without_update():
    generator = torch.manual_seed(5)
    mix = torch.randn(96, 96, generator=generator, dtype=torch.float64)
    gram = mix @ mix.T / 96 + 0.01 * torch.eye(96, dtype=torch.float64)
    weight = torch.randn(8, 96, generator=generator, dtype=torch.float64)
    lost = []
    for choose in (structured._with_update, structured._without_update):
        kept, new = choose(weight, gram, 96, 48)
        assert len(kept) == 48 and kept.tolist() == sorted(set(kept.tolist()))
        change = weight.clone()
        change[:, kept] -= new
        lost.append(float(((change @ gram) * change).sum()))
        # With the groups that stay given, the update is the exact minimum.
        if choose is structured._with_update:
            best = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight.T).T
            torch.testing.assert_close(new, best, rtol=1e-9, atol=1e-9)
    assert lost[0] < 0.5 * lost[1]


def test_layers_that_change_nothing_leave_first(tmp_path):
    tiny.llama(tmp_path, num_hidden_layers=4)
    model = memlm.load(tmp_path)
    with torch.no_grad():
        for i in (1, 2):
            model.layers[i].attention.o_proj.weight.zero_()
            model.layers[i].mlp.down_proj.weight.zero_()
    ids, seen = ids_of(2, 50), []
    with torch.inference_mode():
        before = model(ids)
        removal = remove_(model, calibration(), layers=2, progress=lambda *args: seen.append(args))
        assert removal.layers == (1, 2)
        # Each of three sums of 64 products is off by a few roundings.
        assert max(map(abs, removal.influence[1:3])) < 64 * ROUNDOFF[torch.float32]
        assert min(removal.influence[0], removal.influence[3]) > 0.01
        assert torch.equal(model(ids), before)
        torch.testing.assert_close(model(ids, model.new_cache()), before, **CLOSE)
    memlm.quantize_(model, "int8")
    assert remove_(model, layers=[0]).layers == (0,)  # packed layers leave as well


def test_encoder_equals_the_encoder_with_the_same_parts_zero(tmp_path):
    """But for the biases, which take over the mean of what leaves; padding counts nothing."""
    tiny.bert(tmp_path)
    model = memlm.load(tmp_path)
    ids, mask = ids_of(3, 40), torch.arange(40) < torch.tensor([[40], [13], [23]])
    before, padded = copy.deepcopy(model), copy.deepcopy(model)
    rows = [ids[i : i + 1, : int(mask[i].sum())] for i in range(3)]
    sizes = {"heads": 2, "channels": 0.25, "compensate": False}
    removal = remove_(model, rows, **sizes)
    others = remove_(padded, [(ids, mask)], **sizes)
    assert [part.kept for part in removal.parts] == [part.kept for part in others.parts]
    expected = masked(before, removal)
    for part in removal.parts:
        expected.get_submodule(part.name).bias = model.get_submodule(part.name).bias
    with torch.inference_mode():
        result = model(ids, mask)[mask]
        torch.testing.assert_close(result, expected(ids, mask)[mask], **CLOSE)
        torch.testing.assert_close(padded(ids, mask)[mask], result, **CLOSE)
        memlm.save(model, tmp_path / "small")
        again = memlm.load(tmp_path / "small")
        torch.testing.assert_close(again(ids, mask)[mask], result, **CLOSE)
    assert model.layers[0].qkv_proj.weight.shape == (3 * 32, 64)
    with pytest.raises(RuntimeError, match="mismatch"):  # its heads would be of another size
        BertModel.from_pretrained(tmp_path / "small")


def test_the_bias_absorbs_what_does_not_change(tmp_path):
    """An encoder whose channels are constants loses nothing with them."""
    tiny.bert(tmp_path)
    model = memlm.load(tmp_path)
    with torch.no_grad():
        for layer in model.layers:
            layer.up_proj.weight[:80] = 0  # gelu(bias)
    before, ids = copy.deepcopy(model), ids_of(2, 50)
    # Covariances of what is constant are what rounding the sums of products leaves.
    for compensate, near in ((False, CLOSE), (True, {"rtol": 2e-4, "atol": 2e-4})):
        small = copy.deepcopy(before)
        removal = remove_(small, calibration(), channels=80, compensate=compensate)
        assert all(part.kept == tuple(range(80, 112)) for part in removal.parts)
        with torch.inference_mode():
            torch.testing.assert_close(small(ids), before(ids), **near)


@pytest.mark.parametrize("sizes", [{"heads": 1, "channels": 16}, {"layers": 1}], ids=str)
def test_models_of_transformers_become_what_memlms_become(tmp_path, sizes):
    tiny.llama(tmp_path, num_hidden_layers=3)
    theirs, ours = LlamaForCausalLM.from_pretrained(tmp_path).train(), memlm.load(tmp_path)
    removal = remove_(theirs, calibration(), **sizes)
    expected = remove_(ours, calibration(), **sizes)
    assert theirs.training and all(module.training for module in theirs.modules())
    assert removal.layers == expected.layers
    assert [part.kept for part in removal.parts] == [part.kept for part in expected.parts]
    ids = ids_of(1, 30)
    theirs.eval().save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    # The updates solve systems whose matrices differ by rounding.
    near = {"rtol": 1e-3, "atol": 1e-3}
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), **near)
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, **CLOSE)
        longer = theirs.generate(ids, max_new_tokens=4, do_sample=False)  # with its cache
        step = theirs(longer[:, :-1]).logits[:, 29:].argmax(-1)
    assert torch.equal(longer[:, 30:], step)


def test_bert_of_transformers(tmp_path):
    theirs = tiny.bert(tmp_path)
    ours, ids = memlm.load(tmp_path), ids_of(2, 30)
    mask = torch.arange(30) < torch.tensor([[30], [20]])
    remove_(ours, [(ids, mask)], channels=40)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    remove_(theirs, [batch], channels=40)
    theirs.save_pretrained(tmp_path / "small")
    again = BertModel.from_pretrained(tmp_path / "small")
    with torch.inference_mode():
        result = again(**batch).last_hidden_state[mask]
        torch.testing.assert_close(result, ours(ids, mask)[mask], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="heads: transformers' BERT"):
        remove_(theirs, [batch], heads=1)


REFUSED = {
    "nothing to go by": ({"heads": 1, "calibration": None}, "calibration: none given"),
    "all heads": ({"heads": 2}, "heads: got 2, accepted are 0 to 1"),
    "a share of one": ({"channels": 1.0}, "channels: got 1.0"),
    "negative": ({"layers": -1}, "layers: got -1"),
    "true": ({"heads": True}, "heads: got True"),
    "all layers": ({"layers": [1, 0]}, r"layers: got \[1, 0\]"),
    "a layer twice": ({"layers": [0, 0]}, r"layers: got \[0, 0\]"),
    "no such layer": ({"layers": [2]}, "0 to 1"),
    "damp": ({"heads": 1, "damp": 0}, "damp: got 0"),
    "ids": ({"heads": 1, "layers": [0], "calibration": [ids_of(1, 600)]}, "ids: 600 tokens"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_changes_nothing(tmp_path, arguments, message):
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    state, config = copy.deepcopy(model.state_dict()), model.config
    with pytest.raises(ValueError, match=message):
        remove_(model, **{"calibration": calibration(), **arguments})
    assert model.config == config and len(model.layers) == 2
    after = model.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)


def test_other_models_and_packed_layers_are_refused(tmp_path):
    with pytest.raises(TypeError, match="model: got Linear"):
        remove_(nn.Linear(4, 4), heads=1)
    tiny.llama(tmp_path)
    model = memlm.load(tmp_path)
    targets = {"layers.1.mlp.down_proj": "int8"}
    memlm.quantize_(model, memlm.QuantConfig(None, targets=targets))
    with pytest.raises(TypeError, match="layers.1.mlp.down_proj: is a Linear, not a torch.nn"):
        remove_(model, calibration(), channels=1)
    remove_(model, calibration(), heads=1)
