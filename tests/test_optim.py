"""AdamW8bit: a training beside torch's AdamW, its state, its groups."""

import copy

import pytest
import torch
from torch import nn

from memlm.optim import AdamW8bit

WIDTH = 96


def model(dtype=torch.float32, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(*layers).to(dtype)


def train(net, optimizer, steps: int, first: int = 0) -> list[float]:
    """To follow another network on fresh inputs."""
    torch.manual_seed(99)
    target = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    dtype, losses = next(net.parameters()).dtype, []
    for step in range(first, first + steps):
        x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(net(x.to(dtype)).float(), target(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_trains_as_torch_does():
    """The curves stay within 2 % of each other once smoothed over 10 steps, and end equally low."""
    runs = {}
    for name, kind in (("8 bits", AdamW8bit), ("torch", torch.optim.AdamW)):
        net = model()
        runs[name] = torch.tensor(train(net, kind(net.parameters(), lr=3e-3, weight_decay=0.05), 200))
    smooth = {name: losses.view(-1, 10).mean(1) for name, losses in runs.items()}
    assert smooth["torch"][-1] < 0.25 * smooth["torch"][0]
    assert ((smooth["8 bits"] / smooth["torch"] - 1).abs() < 0.02).all()


def test_f32_moments_are_torchs():
    """Where all parameters are small, it is AdamW but for the order of roundings."""
    net, other = model(), model()
    losses = train(net, AdamW8bit(net.parameters(), lr=1e-2, min_8bit_size=1 << 30), 30)
    expected = train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), 30)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_goes_through_a_state_dict(dtype, tmp_path):
    """Steps go on to the last bit; types and sizes of the state are as documented."""
    net = model(dtype)
    optimizer = AdamW8bit(net.parameters(), lr=1e-2)
    train(net, optimizer, 5)
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    expected = train(net, optimizer, 5, first=5)

    again = model(dtype, seed=1)
    loaded = AdamW8bit(again.parameters(), lr=1.0)
    weights, state = torch.load(tmp_path / "saved.pt")
    again.load_state_dict(weights)
    loaded.load_state_dict(state)
    assert loaded.param_groups[0]["lr"] == 1e-2
    for param, of in loaded.state.items():
        n = param.numel()
        assert of["step"] == 5
        small = n < 4096
        assert of["exp_avg"].dtype == of["exp_avg_sq"].dtype == (torch.float32 if small else torch.uint8)
        assert of["exp_avg"].shape == of["exp_avg_sq"].shape == param.shape
        sizes = sum(t.nbytes for t in of.values() if isinstance(t, torch.Tensor))
        assert sizes == (8 * n if small else 2 * n + 2 * 4 * -(-n // 256))
    assert train(again, loaded, 5, first=5) == expected
    for a, b in zip(net.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_groups():
    """Each has its own numbers; parameters without gradients are left alone."""
    layers = [nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    optimizer = AdamW8bit(
        [
            {"params": layers[:1], "lr": 1e-1, "weight_decay": 0.0},
            {"params": layers[1:], "min_8bit_size": 1 << 20},
        ]
    )
    for layer in layers[:2]:
        layer.grad = torch.full_like(layer, -1.0)
    optimizer.step()
    # The first step is lr times the gradient's sign.
    torch.testing.assert_close(layers[0].detach(), torch.full((64, 64), 1.1))
    torch.testing.assert_close(layers[1].detach(), torch.full((64, 64), 1 * (1 - 1e-5) + 1e-3))
    assert torch.equal(layers[2], torch.ones(64, 64)) and layers[2] not in optimizer.state
    assert optimizer.state[layers[0]]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[layers[1]]["exp_avg"].dtype == torch.float32
    assert optimizer.step(lambda: torch.tensor(7.0)) == 7


def test_elements_in_another_order():
    """A parameter that is a transposed matrix is trained as the matrix is."""
    start = torch.randn(64, 80, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(2))
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(start.T.contiguous().T)
    for param in (plain, turned):
        optimizer = AdamW8bit([param])
        param.grad = grad.clone()
        optimizer.step()
    assert not turned.is_contiguous() and torch.equal(plain, turned) and not torch.equal(plain, start)


def test_copies():
    net = model()
    optimizer = AdamW8bit(net.parameters())
    train(net, optimizer, 2)
    copied = copy.deepcopy(optimizer.state_dict())
    assert copied["state"].keys() == optimizer.state_dict()["state"].keys()


BAD = {
    "lr: got -1": lambda p: AdamW8bit(p, lr=-1),
    "beta2: got 1.5": lambda p: AdamW8bit(p, betas=(0.9, 1.5)),
    "weight_decay: got inf": lambda p: AdamW8bit([{"params": p, "weight_decay": float("inf")}]),
    "params: got torch.float64": lambda p: AdamW8bit([p[0].detach().double()]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]([nn.Parameter(torch.ones(3))])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5000, 2, sparse=True)
    optimizer = AdamW8bit(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="grad: got layout torch.sparse_coo"):
        optimizer.step()
