"""Zeros into trained models: which weights go, what the others become, and what the walk holds."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import memlm
from memlm import sparse_formats
from memlm._format import SparseFormat
from memlm.layers import Linear, SparseLinear
from memlm.models.load import build
from memlm.prune import PruneConfig
from memlm.prune.allocation import _convex, _spread
from memlm.prune.calibration import batches_of
from memlm.prune.gram import Gram
from memlm.prune.patterns import smallest
from memlm.prune.pruning import relative_error
from memlm.prune.scores import magnitude, wanda
from memlm.prune.sparsegpt import block_costs, inverse_factor, sparsegpt

from . import tiny

BLOCK = (16, 32)


def correlated(tokens, k, seed=0):
    """f32 ``[tokens, k]``, every column of another size and with something of the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator)
    sizes = torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)]
    return torch.randn(tokens, k, generator=generator) @ mix * sizes


def normal(n, k, seed=1):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def products(x):
    return x.double().T @ x.double()


# ---- masks


def test_masks_of_hand_made_cases():
    w = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.5], [-8.0, 7.0, -6.0, 0.0, 5.0]])
    assert magnitude(w, 0.4, "unstructured", BLOCK).int().tolist() == [
        [1, 0, 1, 0, 1],
        [0, 0, 0, 1, 0],
    ]
    # One column left over behind the four stays.
    assert magnitude(w, 0.5, "2:4", BLOCK).int().tolist() == [[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    # |w| ||x||: 10 4 2 3 0.5; 80 7 6 0 5, two of each row.
    squares = torch.tensor([100.0, 1, 1, 1, 1], dtype=torch.float64)
    assert wanda(w, squares, 0.4, "unstructured", BLOCK).int().tolist() == [
        [0, 0, 1, 0, 1],
        [0, 0, 0, 1, 1],
    ]


def test_block_masks_go_by_the_norm_of_what_is_there():
    w = torch.zeros(20, 70)  # blocks of 16 x 32, 16 x 32, 16 x 6; 4 x 32, 4 x 32, 4 x 6
    for value, rows, columns in (
        (3.0, slice(0, 16), slice(0, 32)), (1.0, slice(0, 16), slice(32, 64)),
        (2.0, slice(0, 16), slice(64, 70)), (4.0, slice(16, 20), slice(0, 32)),
        (0.5, slice(16, 20), slice(32, 64)), (5.0, slice(16, 20), slice(64, 70)),
    ):  # fmt: skip
        w[rows, columns] = value
    zeros = magnitude(w, 0.5, "block", BLOCK)
    assert torch.equal(zeros, (w == 1) | (w == 0.5) | (w == 2))


# ---- SparseGPT


def surgeon(weight, hessian, pruned):
    """Optimal brain surgeon (Hassibi and Stork 1993), f64, row by row, column by column: a weight
    goes, and those behind it that are best changed in answer, given those before stay as they are,
    are found by least squares anew."""
    w = weight.double().clone()
    for row, zeros in zip(w, pruned):
        for j in range(len(row)):
            if zeros[j]:
                later = slice(j + 1, None)
                # min over d of (d_j, d)^T H (d_j, d), d_j = -w_j
                d = torch.linalg.solve(hessian[later, later], hessian[later, j] * row[j])
                row[later] += d
                row[j] = 0
    return w


@pytest.mark.parametrize("pattern", ("unstructured", "2:4", "block"))
@pytest.mark.parametrize("n, k", ((18, 44), (7, 70), (2, 3)))
def test_sparsegpt_is_optimal_brain_surgeon(pattern, n, k):
    x, w = correlated(300, k), normal(n, k)
    hessian = products(x)
    found = sparsegpt(w, hessian, 0.5, pattern, BLOCK, damping=0.01).weight
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    wanted = surgeon(w, damped, found == 0)
    # f32: each of up to k updates of a weight rounds the weight and the update; weights of an
    # ill-conditioned H swell on the way, which is measured in what the result sees of them.
    root = torch.linalg.cholesky(damped)
    off = ((found.double() - wanted) @ root).norm() / (wanted @ root).norm()
    assert off < 5 * k * 2**-24
    assert ((found == 0).sum() - n * k / 2).abs() <= (n * k / 2 if pattern == "block" else n * 2)


def test_sparsegpt_chooses_what_costs_least_when_it_is_reached():
    """The choice of the second 2:4 four follows the update by the first."""
    k = 8
    hessian, w = products(correlated(100, k)), normal(3, k)
    found = sparsegpt(w, hessian, 0.5, "2:4", BLOCK, damping=0.01).weight
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    pruned, now = torch.zeros(3, k, dtype=torch.bool), w.double()
    for start in (0, 4):
        costs = (now[:, start : start + 4] / u.diagonal()[start : start + 4]) ** 2
        two = costs.argsort(dim=1)[:, :2]
        pruned[:, start : start + 4].scatter_(1, two, True)
        now = surgeon(w, damped, pruned)
    assert torch.equal(found == 0, pruned)


def test_block_costs_are_what_is_lost_when_later_columns_make_up():
    n, k = 20, 70
    hessian, w = products(correlated(200, k)), normal(n, k)
    u = inverse_factor(hessian, 0.01).float()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    for b in (slice(0, 32), slice(32, 64), slice(64, 70)):
        costs, later = block_costs(w[:, b].T, u[b, b], 16), slice(b.stop, None)
        schur = damped[b, b] - damped[b, later] @ torch.linalg.solve(
            damped[later, later], damped[later, b]
        )
        for cost, rows in zip(costs, (slice(0, 16), slice(16, 20))):
            part = w[rows, b].double()
            wanted = float(((part @ schur) * part).sum()) / part.numel()
            assert math.isclose(float(cost), wanted, rel_tol=1e-3)


@pytest.mark.parametrize("pattern", ("unstructured", "2:4", "block"))
def test_sparsegpt_loses_less_than_wanda_and_wanda_than_magnitude(pattern):
    x, w = correlated(800, 160), normal(64, 160)
    hessian = products(x)
    by_magnitude = w.masked_fill(magnitude(w, 0.5, pattern, BLOCK), 0)
    by_wanda = w.masked_fill(wanda(w, hessian.diagonal(), 0.5, pattern, BLOCK), 0)
    updated = sparsegpt(w, hessian, 0.5, pattern, BLOCK).weight
    one, two, three = (relative_error(w, v, hessian) for v in (updated, by_wanda, by_magnitude))
    assert one < two < three


@pytest.mark.parametrize("pattern", ("unstructured", "block"))
def test_sparsity_0_changes_nothing_and_1_leaves_nothing(pattern):
    hessian, w = products(correlated(100, 50)), normal(20, 50)
    assert torch.equal(sparsegpt(w, hessian, 0.0, pattern, BLOCK).weight, w)
    assert not sparsegpt(w, hessian, 1.0, pattern, BLOCK).weight.any()
    for zeros in (magnitude, lambda w, *rest: wanda(w, hessian.diagonal(), *rest)):
        assert not zeros(w, 0.0, pattern, BLOCK).any() and zeros(w, 1.0, pattern, BLOCK).all()


def test_rows_of_zeros_and_dead_inputs():
    x, w = correlated(100, 40), normal(10, 40)
    x[:, [3, 17]] = 0
    w[4] = 0
    hessian = products(x)
    found = sparsegpt(w, hessian, 0.5, "unstructured", BLOCK).weight
    assert torch.isfinite(found).all() and not found[4].any()
    assert relative_error(w, found, hessian) < relative_error(
        w, w.masked_fill(magnitude(w, 0.5, "unstructured", BLOCK), 0), hessian
    )
    nothing = torch.zeros_like(hessian)  # no input at all: any choice is as good
    found = sparsegpt(w, nothing, 0.5, "unstructured", BLOCK).weight
    assert int((found == 0).sum()) == 200 and relative_error(w, found, nothing) == 0


def test_more_damping_where_there_is_no_cholesky_factor():
    ones = torch.ones(6, 6, dtype=torch.float64)
    ones[0, 0] = 1 - 0.05  # its least eigenvalue is below -0.01 and above -0.1
    with pytest.raises(ValueError, match="damping: 1e-08"):
        inverse_factor(ones, 1e-10)
    factor = inverse_factor(ones, 0.01)
    damped = torch.linalg.inv(factor.T @ factor)
    assert torch.allclose(damped - ones, 0.1 * ones.diagonal().mean() * torch.eye(6).double())


@pytest.mark.parametrize(
    "name",
    ("block/int4a-g32", "block/int8-g32", "block/bf16", "block/nf4-g32", "2:4/int4-g64",
     "unstructured/int4-g32", "unstructured/nf4-g64"),
)  # fmt: skip
def test_rounding_inside_the_loop_stays_on_the_grid_and_is_made_up_for(name):
    format = SparseFormat.parse(name)
    n, k = 40, 100
    x, w = correlated(400, k), normal(n, k)
    hessian = products(x)
    done = sparsegpt(w, hessian, 0.5, format.pattern, BLOCK, format=format)
    assert done.packed.format == format and (done.packed.n, done.packed.k) == (n, k)
    assert torch.equal(done.weight, sparse_formats.dequantize(done.packed))
    kept = sparse_formats.unpack(done.packed)[1]
    assert not done.weight[~kept].any()
    # Rounded after the pruning, without making up for it: worse.
    pruned = sparsegpt(w, hessian, 0.5, format.pattern, BLOCK)
    later = memlm.quantize.sparse_quantize(pruned.weight, format)
    joint = relative_error(w, done.weight, hessian)
    assert joint <= relative_error(w, sparse_formats.dequantize(later), hessian) * 1.02


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40), k=st.integers(1, 80), share=st.floats(0, 1),
    pattern=st.sampled_from(("unstructured", "block")), seed=st.integers(0, 99),
)  # fmt: skip
def test_sparsegpt_takes_as_much_as_asked_for(n, k, share, pattern, seed):
    hessian, w = products(correlated(30, k, seed)), normal(n, k, seed)
    zeros = sparsegpt(w, hessian, share, pattern, BLOCK).weight == 0
    if pattern == "unstructured":
        assert int(zeros.sum()) == round(share * n * k)
    else:
        blocks = [c.all() for r in zeros.split(16) for c in r.split(32, dim=1)]
        assert sum(map(bool, blocks)) == round(share * len(blocks))


def test_gram_adds_up_in_f64():
    x = correlated(700, 400)
    gram = Gram(400)
    for part in x.split(300):
        gram.add(part)
    wanted = products(x)
    sizes = x.double().abs().T @ x.double().abs()
    # f32 products of up to 300 terms each (numerics.py), symmetric to the bit.
    assert ((gram.products - wanted).abs() <= 5 * math.sqrt(300) * 2**-24 * sizes).all()
    assert torch.equal(gram.products, gram.products.T) and gram.tokens == 700


# ---- whole models


def text_ids(batch=6, length=40, seed=0):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))


def decoder(**settings):
    config = {**tiny.SIZES, "model_type": "llama", **settings}
    model = build(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def seen_by(model, module, ids):
    """What a linear layer is given for ids."""
    inputs = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return torch.cat(inputs)


def test_decoder_is_pruned_on_what_pruned_layers_give():
    """Layer by layer: the report's errors are those of each layer on what reached it."""
    model, before, ids = decoder(), decoder(), text_ids()
    config = PruneConfig("wanda", 0.5)
    seen = []
    report = memlm.prune_(model, config, ids, lambda *step: seen.append(step))
    names = [layer.name for layer in report.layers]
    assert seen == [(i + 1, 8, name) for i, name in enumerate(names)]
    assert report.left == {"lm_head": "is an output head"} and report.sparsity == 0.5
    # Inside a layer, inputs are those of the layer as it was.
    for i in (0, 1):
        mixed = decoder()
        for j in range(i):
            mixed.layers[j] = model.layers[j]
        for layer in report.layers[4 * i : 4 * i + 4]:
            old, new = (m.get_submodule(layer.name).weight for m in (before, model))
            x = seen_by(mixed, mixed.get_submodule(layer.name), ids).double()
            zeros = wanda(old.detach(), x.square().sum(0), 0.5, "unstructured", BLOCK)
            assert (zeros == (new == 0)).float().mean() > 0.999  # f32 may swap equal ones
            assert torch.equal(new[new != 0], old[new != 0])
            lost, size = (float((x @ w.detach().double().T).norm()) for w in (new - old, old))
            assert math.isclose(layer.error, lost / size, rel_tol=1e-4)


@pytest.mark.parametrize("kind", ("packed", "bfloat16"))
def test_packed_and_16_bit_models(kind):
    model = decoder()
    if kind == "packed":
        memlm.quantize_(model, "int8")
    else:
        model = model.to(torch.bfloat16)
    head = model.lm_head
    report = memlm.prune_(model, PruneConfig(sparsity=0.6), text_ids())
    assert math.isclose(report.sparsity, 0.6, abs_tol=1e-3) and model.lm_head is head
    wanted = torch.float32 if kind == "packed" else torch.bfloat16
    assert {p.dtype for p in model.layers.parameters()} == {wanted}
    assert all(type(layer.mlp.down_proj) is nn.Linear for layer in model.layers)
    assert torch.isfinite(model(text_ids())).all()


def test_with_a_format_layers_are_sparse_and_hold_what_was_found():
    ids, model = text_ids(), decoder(hidden_size=128, intermediate_size=256)
    report = memlm.prune_(model, PruneConfig(pattern="block", format="int4"), ids)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        assert type(module) is SparseLinear and module.format.name == "block/int4a-g32"
        assert layer.bytes == module.packed.nbytes < 0.6 * layer.dense_bytes
        assert layer.sparsity == 0.5
    assert model(ids).isfinite().all()
    assert report.to_dict()["bytes"] == sum(layer.bytes for layer in report.layers)
    assert str(report).count("\n") == 8 + 2  # heading, 8 layers, total, one left


def test_any_model_by_magnitude():
    model = nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 7))
    before = [layer.weight.clone() for layer in (model[0], model[2])]
    config = PruneConfig("magnitude", 0.25, targets={"2": 0.5})
    report = memlm.prune_(model, config)
    assert [layer.error for layer in report.layers] == [None, None]
    for layer, old, share in zip((model[0], model[2]), before, (0.25, 0.5)):
        zeros = smallest(old.abs(), share, "unstructured")
        assert torch.equal(layer.weight, old.masked_fill(zeros, 0))
    with pytest.raises(TypeError, match="model: got Sequential"):
        memlm.prune_(model, PruneConfig("wanda"), text_ids())


def test_encoder_does_not_look_at_padding(tmp_path):
    tiny.bert(tmp_path)
    ids = text_ids(4, 20)
    mask = torch.arange(20) < torch.tensor([20, 5, 12, 1])[:, None]
    found = []
    for filler in (0, 77):
        model = memlm.load(tmp_path)
        memlm.prune_(model, PruneConfig(), (ids.masked_fill(~mask, filler), mask))
        found.append([p.clone() for p in model.parameters() if p.dim() == 2])
    for a, b in zip(*found):
        assert torch.equal(a == 0, b == 0) and torch.allclose(a, b, atol=1e-5)


def test_transformers_and_memlm_prune_alike(tmp_path):
    tiny.llama(tmp_path)
    ids = text_ids()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = memlm.load(tmp_path)
    config = PruneConfig("wanda", 0.5)
    memlm.prune_(theirs, config, ids)
    memlm.prune_(ours, config, ids)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-3)


def test_only_one_layer_is_alive():
    """Of one layer's products nothing is left when those of the next are begun, or its states."""
    model, alive, counts = decoder(num_hidden_layers=3), weakref.WeakSet(), []
    original = Gram.__init__

    def counted(self, columns):
        original(self, columns)
        alive.add(self)
        counts.append(len(alive))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gram, "__init__", counted)
        memlm.prune_(model, PruneConfig(), text_ids(), lambda *_: counts.append(len(alive)))
    # Four inputs, one fewer after each of the four linear layers.
    assert counts == [1, 2, 3, 4, 4, 3, 2, 1] * 3


def test_allocation_has_the_wanted_mean_and_less_error():
    ids = text_ids()
    reports = [
        memlm.prune_(decoder(), PruneConfig("wanda", 0.5, allocation=a), ids)
        for a in ("uniform", "sensitivity")
    ]
    assert math.isclose(reports[1].sparsity, 0.5, abs_tol=1 / 128)  # of rows of 64
    errors = [sum(layer.error**2 for layer in r.layers[:4]) for r in reports]
    shares = {layer.sparsity for layer in reports[1].layers}
    assert len(shares) > 1 and max(shares) <= 0.71 and min(shares) >= 0.29
    total = [sum(layer.error**2 for layer in r.layers) for r in reports]
    assert total[1] < total[0] or errors[1] < errors[0]


def test_spread_by_hand():
    levels = [0.0, 0.5, 1.0]
    costs = {"a": [0.0, 1.0, 4.0], "b": [0.0, 10.0, 40.0]}
    # 15 of 30 weights: a's 10 cost 1/5 and 3/5 each, then 5 of b's 20 at 1 each.
    assert _spread(costs, {"a": 10, "b": 20}, levels, 0.5) == {"a": 1.0, "b": 0.25}
    assert _convex([0.0, 3.0, 2.0], levels) == [0.0, 1.0, 2.0]


def test_text_becomes_batches(tmp_path):
    model = decoder()
    tiny.tokenizer(tmp_path)
    from memlm.io.tokenizer import load_tokenizer

    with pytest.raises(ValueError, match="no tokenizer"):
        batches_of(model, "text", 4, 8)
    model.tokenizer = load_tokenizer(tmp_path)
    pieces = torch.cat(batches_of(model, "abcdefgh" * 10, 4, 16))
    assert pieces.shape == (4, 16)
    assert model.tokenizer.decode(pieces[0].tolist()) == "abcdefgh" * 2


def test_texts_become_batches_with_masks(tmp_path):
    tiny.bert(tmp_path)
    tiny.tokenizer(tmp_path)
    model = memlm.load(tmp_path)
    texts = ["abc", "abcdefghijkl", "ab", "x" * 700]
    batches = batches_of(model, texts, 4, 10)
    rows = [row[mask].tolist() for ids, mask in batches for row, mask in zip(ids, mask)]
    assert sorted(map(len, rows)) == [2, 3, 10, 10]
    assert {"abc", "ab", "x" * 10} < {model.tokenizer.decode(row) for row in rows}
    # One string: pieces of 7 words, of which 10 tokens stay, and a last one of one word.
    batches = batches_of(model, "a " * 50, 100, 10)
    assert sum(int(mask.sum()) for _, mask in batches) == 7 * 10 + 1


@pytest.mark.parametrize(
    "settings, match",
    (
        ({"method": "obs"}, "method: got 'obs'"),
        ({"pattern": "4:8"}, "pattern: got '4:8'"),
        ({"sparsity": 1.5}, "sparsity: got 1.5"),
        ({"sparsity": math.nan}, "sparsity: got nan"),
        ({"pattern": "2:4", "sparsity": 0.4}, "of 2:4 it is 0.5"),
        ({"pattern": "block", "block": (8, 32)}, "block: got"),
        ({"format": "int8"}, "values: got int8-g32, accepted in unstructured"),
        ({"damping": 0}, "damping: got 0"),
        ({"targets": {"re:(": 0.5}}, "pattern"),
        ({"allocation": "sensitivity", "pattern": "2:4"}, "allocation"),
        ({"samples": 0}, "samples: got 0"),
    ),
)
def test_bad_configs(settings, match):
    with pytest.raises(ValueError, match=match):
        PruneConfig(**settings)


def test_what_is_refused_leaves_the_model_unchanged():
    model, ids = decoder(), text_ids()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="calibration: none given"):
        memlm.prune_(model, PruneConfig())
    with pytest.raises(ValueError, match="calibration: none given"):
        memlm.prune_(model, PruneConfig(), [])
    with pytest.raises(ValueError, match="matches no layer"):
        memlm.prune_(model, PruneConfig(ignore=["nothing"]), ids)
    with pytest.raises(ValueError, match="no linear layer to prune"):
        memlm.prune_(model, PruneConfig(ignore=["Linear"]), ids)
    with pytest.raises(TypeError, match="config: got str"):
        memlm.prune_(model, "sparsegpt", ids)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj: its weight contains NaN"):
        memlm.prune_(model, PruneConfig(), ids)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.copy_(before["layers.1.mlp.down_proj.weight"])
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        model.layers[0].input_norm.weight[2] = math.nan
    with pytest.raises(ValueError, match="layers.0.attention.qkv_proj: its input from the cal"):
        memlm.prune_(model, PruneConfig(), ids)


def test_ignored_layers_stay_packed():
    model = decoder()
    memlm.quantize_(model, "int8")
    kept = model.layers[0].mlp.down_proj
    memlm.prune_(model, PruneConfig(ignore=["re:.*down_proj"]), text_ids())
    assert model.layers[0].mlp.down_proj is kept and isinstance(kept, Linear)
    assert type(model.layers[0].mlp.gate_up_proj) is nn.Linear
