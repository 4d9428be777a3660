"""Gradual pruning: what is pruned when, and that it stays zero whatever the optimizer does."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memlm.prune import GradualPruning
from memlm.prune.schedule import smallest

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    # Orthogonalises the whole update: zeros in the gradient do not stay zeros.
    "muon": lambda p: torch.optim.Muon(p, 0.01),
}
SHARES = {"unstructured": 0.7, "2:4": 0.5, "block": 0.6}


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 23, bias=False), nn.Tanh(),
        nn.Linear(23, 8, bias=False),
    )  # fmt: skip


def train(model, optimizer, steps, run=None):
    """Yields after each of the ``steps``, whose data is always the same."""
    run = run or model
    for step in steps:
        x = torch.randn(16, 24, generator=torch.manual_seed(step))
        optimizer.zero_grad()
        (run(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()
        yield


@pytest.mark.parametrize("pattern", SHARES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_survive_optimizer_steps(name, pattern):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruning = GradualPruning(
        model, optimizer, SHARES[pattern], end=6, every=2, pattern=pattern, block=(4, 8)
    )
    before = copy.deepcopy(model)
    masks, shares = pruning.masks.pruned, []
    for step, _ in enumerate(train(model, optimizer, range(12)), 1):
        for key, mask in masks.items():
            weight = model.get_parameter(key)
            assert (weight[mask] == 0).all() and weight.isfinite().all()
            assert (weight.grad[mask] == 0).all()
            moved = weight[~mask] != before.get_parameter(key)[~mask]
            assert moved.float().mean() > 0.9  # the others are trained
            for tensor in optimizer.state[weight].values():
                if tensor.shape == mask.shape:
                    assert (tensor[mask] == 0).all()
        shares.append(float(masks["0.weight"].float().mean()))
        assert pruning.step == step
    assert shares[0] == 0 and shares[1] == shares[2] < shares[3] == shares[4] < shares[5]
    assert shares[5:] == [shares[5]] * 7
    for mask in masks.values():
        if pattern == "2:4" and mask.shape[1] % 4 == 0:
            assert (mask.view(len(mask), -1, 4).sum(-1) == 2).all()
        if pattern == "block" and mask.shape == (40, 24):
            whole = mask.view(10, 4, 3, 8).permute(0, 2, 1, 3).flatten(2)
            assert (whole.all(-1) | ~whole.any(-1)).all() and whole.all(-1).sum() == 18

    # Without the hold the same steps would move them.
    pruning.remove()
    zero = model[0].weight == 0
    for _ in train(model, optimizer, range(1)):
        assert (model[0].weight[zero] != 0).any()
    assert pruning.step == 12


def test_what_leaves_is_smallest_when_it_leaves_and_follows_the_cubic_schedule():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    seen = []
    pruning = GradualPruning(model, optimizer, 0.8, initial=0.2, begin=2, end=9, every=3)
    for step, _ in enumerate(train(model, optimizer, range(12)), 1):
        zeros = {key: (p == 0).sum().item() for key, p in model.named_parameters()}
        updates = [t for t in (2, 5, 8, 9) if t <= step]
        for key, parameter in model.named_parameters():
            if updates:
                share = 0.8 - 0.6 * (1 - (updates[-1] - 2) / 7) ** 3
                assert zeros[key] == round(share * parameter.numel())
            else:
                assert zeros[key] == 0
        seen.append(copy.deepcopy(pruning.masks.pruned))
    for earlier, later in itertools.pairwise(seen):
        assert all((later[key] >= earlier[key]).all() for key in later)


def test_updates_take_the_smallest_of_the_moment():
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -1, 2, 8], [-7, 3, 5, 6]]))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    GradualPruning(model, optimizer, 0.5, begin=1, end=3, every=1, initial=0.25)

    def step(gradient):
        model.weight.grad = torch.tensor(gradient)
        optimizer.step()
        return model.weight.tolist()

    still = [[0.0] * 4] * 2
    assert step(still) == [[4, 0, 0, 8], [-7, 3, 5, 6]]  # 2 of 8
    # 0.5 - 0.25 / 8 of 8: 4.  The 8 has become smallest.
    assert step([[0.0, 9, 9, 7.5], [0.0] * 4]) == [[4, 0, 0, 0], [-7, 0, 5, 6]]
    assert step(still) == [[4, 0, 0, 0], [-7, 0, 5, 6]]


@given(
    st.integers(1, 9), st.integers(1, 13), st.floats(0, 1), st.sampled_from(list(SHARES)),
    st.tuples(st.integers(1, 4), st.integers(1, 5)), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_smallest_is_what_trying_all_finds(n, k, share, pattern, block, seed):
    scores = torch.rand(n, k, generator=torch.manual_seed(seed))
    share = share / 2 if pattern == "2:4" else share
    found = smallest(scores, share, pattern, block)
    expected = torch.zeros(n, k, dtype=torch.bool)
    if pattern == "block":
        parts = [
            (slice(i, i + block[0]), slice(j, j + block[1]))
            for i in range(0, n, block[0])
            for j in range(0, k, block[1])
        ]
        parts.sort(key=lambda at: scores[at].square().mean())
        for at in parts[: round(share * len(parts))]:
            expected[at] = True
    else:
        places = [(i, j) for i in range(n) for j in range(k)]
        if pattern == "2:4":  # at most two stay of four: of three one has to go, of two none
            places, allowed = [], 0
            for i, first in itertools.product(range(n), range(0, k, 4)):
                four = sorted(range(first, min(first + 4, k)), key=lambda j: scores[i, j])
                places += [(i, j) for j in four[: max(0, len(four) - 2)]]
                allowed += max(0, len(four) - 2)
            share = 2 * share
        places.sort(key=lambda at: scores[at])
        for at in places[: round(share * len(places))]:
            expected[at] = True
    assert torch.equal(found, expected)


def test_goes_on_from_its_state():
    def start(model):
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return model, optimizer, GradualPruning(model, optimizer, 0.6, end=8, every=3)

    def run(model, optimizer, pruning, steps):
        for _ in train(model, optimizer, steps):
            pass
        return copy.deepcopy([part.state_dict() for part in (model, optimizer, pruning)])

    straight = run(*start(make()), range(10))
    state = run(*start(make()), range(4))
    parts = start(make(seed=9))
    for part, saved in zip(parts, state):
        part.load_state_dict(saved)
    resumed = run(*parts, range(4, 10))
    assert straight[2]["step"] == resumed[2]["step"] == 10
    for key, weight in straight[0].items():
        assert torch.equal(weight, resumed[0][key])
        assert torch.equal(straight[2]["pruned"][key], resumed[2]["pruned"][key])


def test_with_a_compiled_model():
    results = []
    for compiled in (False, True):
        model = make()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        GradualPruning(model, optimizer, 0.6, end=4, every=2)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for _ in train(model, optimizer, range(6), run):
            pass
        results.append(model[2].weight.detach())
    assert (results[0] == 0).sum() == round(0.6 * 23 * 40)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0] == 0, results[1] == 0)


def test_heads_stay_and_shared_weights_are_pruned_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.lm_head = nn.Linear(8, 16)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert list(GradualPruning(model, optimizer, 0.5, end=1).masks.pruned) == ["first.weight"]
    chosen = GradualPruning(
        model, optimizer, 0.5, end=1, filter_fn=lambda module, name: name == "lm_head"
    )
    assert list(chosen.masks.pruned) == ["lm_head.weight"]


REFUSED = {
    "pattern": ({"pattern": "4:2"}, "pattern: got '4:2'"),
    "sparsity": ({"sparsity": 1.5}, "sparsity: got 1.5"),
    "2:4": ({"pattern": "2:4", "sparsity": 0.6}, "sparsity: got 0.6, accepted is 0 to 0.5"),
    "initial": ({"initial": 0.7}, "initial: got 0.7"),
    "end": ({"begin": 5, "end": 5}, "end: got 5"),
    "every": ({"every": 0}, "every: got 0"),
    "block": ({"pattern": "block", "block": (0, 8)}, "block: got"),
    "nothing": ({"filter_fn": lambda *_: False}, "model: has no torch.nn.Linear"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments(arguments, message):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=message):
        GradualPruning(model, optimizer, **{"sparsity": 0.5, "end": 10, **arguments})


def test_bad_optimizer_and_state():
    model, other = make(), make()
    with pytest.raises(ValueError, match="optimizer: does not train 0.weight"):
        GradualPruning(model, torch.optim.SGD(other.parameters(), 0.1), 0.5, end=1)
    with pytest.raises(TypeError, match="model: got str"):
        GradualPruning("model", torch.optim.SGD(other.parameters(), 0.1), 0.5, end=1)
    pruning = GradualPruning(model, torch.optim.SGD(model.parameters(), 0.1), 0.5, end=1)
    state = pruning.state_dict()
    state["pruned"]["2.weight"] = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"state: 2.weight: got a mask of shape \(3, 3\)"):
        pruning.load_state_dict(state)
    assert not any(mask.any() for mask in pruning.masks.pruned.values())
