"""Perplexity and KL divergence against their definitions, and on the real model."""

import copy
import math

import pytest
import torch

import memlm
from memlm import data
from memlm.models.evaluate import evaluate, evaluate_all

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(folder)
    return folder


@pytest.fixture
def model(folder):
    return memlm.load(folder)


def ids_of(count):
    return torch.randint(256, (count,), generator=torch.manual_seed(2)).tolist()


def by_definition(model, base, ids, window):
    """In f64, one position after the other."""
    nll, kl, agree, count = 0.0, 0.0, 0, 0
    for start in range(0, len(ids) - window + 1, window):
        row = ids[start : start + window]
        with torch.inference_mode():
            p, q = (m(torch.tensor([row]))[0].double().softmax(-1) for m in (model, base))
        for i in range(window - 1):
            nll -= math.log(p[i, row[i + 1]])
            kl += float((q[i] * (q[i].log() - p[i].log())).sum())
            agree += int(p[i].argmax() == q[i].argmax())
            count += 1
    return math.exp(nll / count), kl / count, agree / count, count


@pytest.mark.parametrize(
    "kv, least, most", [("f32", 0, 1e-7), ("int8", 1e-7, 1e-4), ("int4", 1e-4, 0.2)]
)
def test_through_a_cache(model, kv, least, most):
    """What rounding keys and values does: nothing in f32, and little in 8 bits."""
    cached = evaluate(model, ids_of(300), model, 100, kv=kv)
    plain = evaluate(model, ids_of(300), model, 100)
    assert cached.tokens == plain.tokens and plain.kl == 0
    assert least <= abs(cached.kl) <= most
    assert cached.perplexity == pytest.approx(plain.perplexity, rel=10 * most + 1e-5)


@pytest.mark.parametrize("window", [2, 50, 100, 130])
def test_scores_are_as_defined(model, window):
    """Windows within, across and not dividing the blocks of the sums; a last short one dropped."""
    quantised = memlm.quantize_(copy.deepcopy(model), "int4")
    ids = ids_of(275)
    score = evaluate(quantised, ids, model, window)
    perplexity, kl, agreement, count = by_definition(quantised, model, ids, window)
    assert score.tokens == count == 275 // window * (window - 1)
    assert score.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert score.kl == pytest.approx(kl, rel=1e-3)
    assert score.agreement == agreement
    assert 1e-4 < kl and 0 < agreement < 1


def test_a_model_does_not_differ_from_itself(model):
    score = evaluate(model, ids_of(100), model, 50)
    assert score.kl == 0 and score.agreement == 1
    alone = evaluate(model, ids_of(100), window=50)
    assert alone.perplexity == score.perplexity
    assert alone.kl is None and alone.agreement is None


def test_a_uniform_model_has_the_vocabulary_as_perplexity(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate(model, ids_of(100), window=50).perplexity == pytest.approx(256, rel=1e-5)


def test_broken_models_are_not_scored_well(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert evaluate(model, ids_of(100), window=50).perplexity == math.inf
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(evaluate(model, ids_of(100), window=50).perplexity)


def test_all_at_once_equals_one_by_one(model):
    models = {"f32": model, "int8": memlm.quantize_(copy.deepcopy(model), "int8")}
    seen = []
    scores = evaluate_all(
        models, ids_of(200), model, 50, lambda done, total, item: seen.append((done, total))
    )
    assert scores == {n: evaluate(m, ids_of(200), model, 50) for n, m in models.items()}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bad_arguments(model, tmp_path):
    with pytest.raises(ValueError, match="ids: 49 tokens are fewer than one window of 50"):
        evaluate(model, ids_of(49), window=50)
    for window in (1, 513):
        with pytest.raises(ValueError, match=f"window: got {window}, accepted is 2 to 512"):
            evaluate(model, ids_of(1000), window=window)
    with pytest.raises(ValueError, match="models: none given"):
        evaluate_all({}, ids_of(100))
    tiny.llama(tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match="base: has another vocabulary"):
        evaluate(model, ids_of(100), memlm.load(tmp_path), 50)
    (tmp_path / "bert").mkdir()
    tiny.bert(tmp_path / "bert")
    with pytest.raises(TypeError, match="models: got Encoder"):
        evaluate(memlm.load(tmp_path / "bert"), ids_of(100), window=50)


@pytest.mark.models
def test_smollm2_on_moby_dick():
    """The figure that a right loader, tokenizer and model give: 16 windows, 8,176 predictions."""
    model = memlm.load(data.smollm2_gguf(), dequantize=True)
    ids = model.tokenizer.encode(data.moby_dick())[:8192]
    score = evaluate(model, ids)
    assert score.tokens == 8176
    assert score.perplexity == pytest.approx(58.16, abs=0.01)
