"""Training what pruning left: the loss and its gradients against plain autograd, zeros that stay, a
model that comes nearer to its teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memlm
from memlm.models.evaluate import evaluate
from memlm.prune import PruneConfig, recover, recover_

from . import tiny


def text(count, seed=1):
    return torch.randint(256, (count,), generator=torch.manual_seed(seed)).tolist()


def halve_(model):
    """The smaller half of each matrix in the layers becomes zero."""
    with torch.no_grad():
        for module in model.layers.modules():
            if isinstance(module, nn.Linear):
                size = module.weight.abs()
                module.weight[size < size.median()] = 0
    return model


@pytest.fixture
def dense(tmp_path):
    tiny.llama(tmp_path)
    return memlm.load(tmp_path)


@pytest.mark.parametrize("distil", [False, True])
def test_loss_and_gradients_are_those_of_the_whole_at_once(dense, distil, monkeypatch):
    ids, student = torch.tensor([text(150)]), halve_(copy.deepcopy(dense))
    teacher = dense if distil else None
    with torch.no_grad():
        wanted = dense(ids)[0].double().softmax(-1)
    logits = student(ids)[0].double()
    if distil:
        expected = (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1).mean()
    else:
        expected = F.cross_entropy(logits[:-1], ids[0, 1:])
    (expected / 3).backward()  # as a third of a batch
    gradients = {name: p.grad.clone() for name, p in student.layers.named_parameters()}
    student.zero_grad()

    rows, plain = [], student.logits
    monkeypatch.setattr(student, "logits", lambda x: rows.append(len(x)) or plain(x))
    loss = recover._backward(student, teacher, ids, 3)
    assert rows == [64, 64, 22 if distil else 21]
    assert loss == pytest.approx(expected.item() / 3, rel=1e-5)
    for name, parameter in student.layers.named_parameters():
        error = (parameter.grad - gradients[name]).norm()
        assert error <= 1e-5 * gradients[name].norm(), name


def test_a_pruned_model_comes_nearer_to_its_teacher(dense):
    teacher = copy.deepcopy(dense.state_dict())
    model, seen = halve_(copy.deepcopy(dense)), []
    zeros = {name: p == 0 for name, p in model.named_parameters()}
    before = evaluate(model, text(1000, seed=2), dense, window=100).kl
    losses = recover_(
        model, text(5000), dense, steps=40, batch=2, window=64, lr=3e-3,
        progress=lambda *args: seen.append(args),
    )  # fmt: skip
    after = evaluate(model, text(1000, seed=2), dense, window=100).kl
    assert after < 0.7 * before
    assert losses[0] == pytest.approx(before, rel=0.3) and len(losses) == 40
    assert seen[0] == (1, 40, f"loss {losses[0]:.4f}") and seen[-1][0] == 40
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        changed = not torch.equal(parameter, teacher[name])
        assert changed == name.startswith("layers.")
        if name.startswith("layers.") and parameter.dim() == 2:
            assert (parameter == 0)[zeros[name]].all()
            assert 0.49 < (parameter == 0).float().mean() < 0.51
    assert all(torch.equal(dense.state_dict()[name], teacher[name]) for name in teacher)

    # The optimizer has let go: zeros may move again.
    model.layers[0].mlp.down_proj.weight.sum().backward()
    assert (model.layers[0].mlp.down_proj.weight.grad == 1).all()


def test_sparse_layers_learn_what_masked_ones_learn(dense):
    """The same steps on values of blocks in f32 and on whole matrices with masks."""
    masked = copy.deepcopy(dense)
    memlm.prune_(masked, PruneConfig("magnitude", 0.5, "block"))
    sparse = memlm.sparsify_(copy.deepcopy(masked), "block/f32", strict=True)
    settings = {"steps": 6, "batch": 2, "window": 70, "lr": 1e-3}
    losses = [recover_(model, text(2000), dense, **settings) for model in (masked, sparse)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]
    memlm.dequantize_(sparse)
    for name, weight in masked.layers.named_parameters():
        other = sparse.layers.get_parameter(name)
        if weight.dim() == 2:
            assert torch.equal(weight == 0, other == 0)
            assert not torch.equal(weight, dense.layers.get_parameter(name))
        # AdamW divides gradients, off by rounding, by their own size.
        assert (weight - other).abs().max() <= 6 * 1e-3
        assert (weight - other).norm() <= 0.02 * (weight - dense.layers.get_parameter(name)).norm()


def test_text_alone_and_a_packed_head(dense):
    """Without a teacher the text's own statistics are learned; only what requires gradients."""
    model = halve_(dense)
    memlm.quantize_(model, memlm.QuantConfig(None, "int8", "int8"))
    model.layers[0].requires_grad_(False)
    first = copy.deepcopy(model.layers[0].state_dict())
    ids = text(40) * 50
    settings = {"steps": 30, "batch": 1, "window": 80, "lr": 3e-3}
    again = copy.deepcopy(model)
    losses = recover_(model, ids, **settings)
    assert losses[-1] < 0.7 * losses[0]
    assert recover_(again, ids, **settings) == losses  # the same windows, by the seed
    assert all(torch.equal(t, first[name]) for name, t in model.layers[0].state_dict().items())


REFUSED = {
    "itself": ({"teacher": "model"}, ValueError, "teacher: is the model itself"),
    "a module": ({"teacher": nn.Linear(2, 2)}, TypeError, "teacher: got Linear"),
    "a long window": ({"window": 600}, ValueError, "window: got 600, accepted is 2 to 512"),
    "a short text": ({"window": 400}, ValueError, "no more than the text's 300"),
    "steps": ({"steps": 0}, ValueError, "steps: got 0"),
    "lr": ({"lr": -1.0}, ValueError, "lr: got -1.0"),
}


@pytest.mark.parametrize("arguments, kind, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments(dense, arguments, kind, message):
    if arguments.get("teacher") == "model":
        arguments = {"teacher": dense}
    with pytest.raises(kind, match=message):
        recover_(dense, text(300), **{"steps": 1, "window": 20, **arguments})


def test_nothing_to_train(dense):
    memlm.quantize_(dense, memlm.QuantConfig("int8"))
    dense.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of its layers requires gradients"):
        recover_(dense, text(300), steps=1, window=20)
    with pytest.raises(TypeError, match="model: got Linear"):
        recover_(nn.Linear(2, 2), text(300), steps=1)
