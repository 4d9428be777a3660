"""Sequences decoded together: as each alone, joining, leaving, waiting for blocks, sharing beginnings."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm import data
from memlm.models.batch import Batch
from memlm.models.generate import generate
from memlm.models.sampling import Sampling

from . import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights as floats and packed, the latter in the mode that rounds no activations."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(folder)
    config = memlm.QuantConfig("int8", "int8", "int8", mode="accurate")
    return {"float": memlm.load(folder), "packed": memlm.quantize_(memlm.load(folder), config)}


kinds = pytest.mark.parametrize("kind", ["float", "packed"])


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def run(batch: Batch, results: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    """Steps until all sequences have ended; tokens by handle."""
    results = {} if results is None else results
    while len(batch):
        step(batch, results)
    return results


def step(batch: Batch, results: dict[int, list[int]]) -> None:
    """One step, whose tokens are added to those before."""
    for handle, token in batch.step():
        if token is not None:
            results.setdefault(handle, []).append(token)


REQUESTS = [
    # prompt's length, tokens, how they are chosen
    (5, 30, Sampling()),
    (1, 7, Sampling(0.8, seed=3)),
    (130, 20, Sampling(1.2, top_k=20, seed=1)),
    (64, 1, Sampling()),
    (63, 12, Sampling(0.7, top_k=5, top_p=0.8, seed=2)),
    (200, 15, Sampling(1.0, top_p=0.6, seed=9)),
]


@kinds
@pytest.mark.parametrize("chunk", [512, 50, 1])
def test_as_each_alone(models, kind, chunk):
    model, alone = models[kind], []
    for i, (length, tokens, s) in enumerate(REQUESTS):
        settings = (s.temperature, s.top_k, s.top_p, s.seed)
        names = ("temperature", "top_k", "top_p", "seed")
        alone.append(list(generate(model, prompt(i, length), tokens, **dict(zip(names, settings)))))
        assert len(alone[-1]) == tokens
    batch = Batch(model, chunk=chunk)
    handles = [
        batch.add(prompt(i, length), tokens, sampling)
        for i, (length, tokens, sampling) in enumerate(REQUESTS)
    ]
    results = run(batch)
    assert [results[handle] for handle in handles] == alone
    assert batch.cache.sequences == () and batch.step() == []


@kinds
def test_joining_and_leaving_between_steps(models, kind):
    model = models[kind]
    expected = {i: list(generate(model, prompt(i, 20 + 9 * i), 10 + i)) for i in range(6)}
    batch, results, made = Batch(model), {}, {}
    for i in range(6):
        made[batch.add(prompt(i, 20 + 9 * i), 10 + i)] = i
        for _ in range(3):
            step(batch, results)
    gone = batch.add([1, 2, 3], 50)
    step(batch, results)
    batch.remove(gone)
    batch.remove(gone)
    waiting = batch.add([1, 2, 3], 50)
    batch.remove(waiting)
    assert {
        made[handle]: tokens for handle, tokens in run(batch, results).items() if handle in made
    } == expected


@kinds
def test_stop_tokens_are_each_ones_own(models, kind):
    model = models[kind]
    tokens = list(generate(model, prompt(0, 9), 30))
    batch = Batch(model)
    stops = [batch.add(prompt(0, 9), 30, stop_ids=[tokens[n]]) for n in (4, 11)]
    never = batch.add(prompt(0, 9), 30)
    results = run(batch)
    assert [results[h] for h in stops] == [tokens[: tokens.index(tokens[n])] for n in (4, 11)]
    assert results[never] == tokens


def test_waits_for_blocks(models):
    model = models["packed"]
    # Each takes 100 + 20 tokens at most: 4 blocks of 32.
    expected = [list(generate(model, prompt(i, 100), 20)) for i in range(5)]
    batch = Batch(model, model.new_cache(block_tokens=32, blocks=9))
    handles = [batch.add(prompt(i, 100), 20) for i in range(5)]
    results = {}
    step(batch, results)
    assert len(batch.cache.sequences) == 2 and len(batch) == 5
    run(batch, results)
    assert [results[handle] for handle in handles] == expected
    with pytest.raises(
        memlm.errors.OutOfBlocks, match="ids: 10 blocks are needed, the cache has 9"
    ):
        batch.add(prompt(0, 280), 20)


def test_common_beginnings_are_computed_once(models, monkeypatch):
    model, common = models["packed"], prompt(0, 150)
    expected = [list(generate(model, common + [i], 8)) for i in range(4)]
    batch, rows = Batch(model, model.new_cache(block_tokens=32)), []
    run_layers = type(model).run

    def counted(self, ids, *arguments):
        rows.append(len(ids))
        return run_layers(self, ids, *arguments)

    monkeypatch.setattr(type(model), "run", counted)
    first = batch.add(common + [0], 8)
    results = {}
    step(batch, results)
    handles = [first, *(batch.add(common + [i], 8) for i in range(1, 4))]
    run(batch, results)
    assert [results[handle] for handle in handles] == expected
    # 4 blocks of 32 are shared; 23 tokens are left of 151.
    assert rows[:2] == [151, 1 + 3 * 23]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90), st.integers(1, 9)), max_size=6),
    st.data(),
)
def test_any_sequence_of_events(models, requests, data):
    """Requests come at any time; each result is what it is alone."""
    model = models["packed"]
    batch = Batch(
        model, model.new_cache(block_tokens=32, blocks=8), chunk=data.draw(st.integers(1, 60))
    )
    results, expected = {}, {}
    for seed, length, tokens in requests:
        handle = batch.add(prompt(seed, length), tokens)
        expected[handle] = list(generate(model, prompt(seed, length), tokens))
        for _ in range(data.draw(st.integers(0, 4))):
            step(batch, results)
    assert run(batch, results) == expected
    assert batch.cache.sequences == ()


def test_bad_arguments(models):
    model = models["float"]
    with pytest.raises(TypeError, match="model: got Linear, expected a Decoder"):
        Batch(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="chunk: got 0"):
        Batch(model, chunk=0)
    for ids, tokens, message in (
        ([], 1, "ids: the prompt is empty"),
        ([256], 1, "ids: accepted are 0 to 255"),
        ([0] * 513, 1, "ids: 513 tokens, the model takes 512"),
        ([0], 0, "max_tokens: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Batch(model).add(ids, tokens)


@pytest.mark.models
def test_smollm2_writes_the_same_in_a_batch():
    """In 4 bits, with activations rounded: the likeliest tokens stay what they are alone."""
    model = memlm.load(data.smollm2_gguf(), dequantize=True)
    memlm.quantize_(model, memlm.QuantConfig("int4", embedding="int8"))
    texts = [
        "The capital of France is",
        "Once upon a time, in a village",
        "1, 2, 3, 4,",
        "Water boils at",
    ]
    prompts = [model.tokenizer.encode(text) for text in texts]
    alone = [list(generate(model, ids, 8)) for ids in prompts]
    batch = Batch(model)
    handles = [batch.add(ids, 8) for ids in prompts]
    results = run(batch)
    assert [results[handle] for handle in handles] == alone
