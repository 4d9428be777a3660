"""Choosing tokens, generating, and turning tokens into text as they come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import memlm
from memlm import data
from memlm.models.generate import TextStream, generate
from memlm.models.sampling import Sampling

from . import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(folder)
    return memlm.load(folder)


PROMPT = [5, 200, 31, 7]


def greedy_without_cache(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_greedy_is_the_likeliest_token_each_time(model):
    expected = greedy_without_cache(model, PROMPT, 30)
    assert list(generate(model, PROMPT, 30)) == expected
    assert len(set(expected)) > 3
    # However wide the choice: temperature 0 draws nothing.
    assert list(generate(model, PROMPT, 30, top_k=5, top_p=0.5, seed=1)) == expected


def test_top_k_of_one_is_greedy(model):
    expected = list(generate(model, PROMPT, 20))
    assert list(generate(model, PROMPT, 20, temperature=5.0, top_k=1, seed=0)) == expected


def test_stops_before_a_stop_token(model):
    tokens = list(generate(model, PROMPT, 30))
    stop = tokens[4]
    assert list(generate(model, PROMPT, 30, stop_ids=[stop])) == tokens[: tokens.index(stop)]


def test_stops_when_the_positions_are_full(model):
    # The last token needs no position: nothing is computed after it.
    assert len(list(generate(model, [1] * 500, 100))) == 13
    assert len(list(generate(model, [1] * 512, 100))) == 1


def test_seed_repeats_and_seeds_differ(model):
    def run(seed):
        return list(generate(model, PROMPT, 20, temperature=1.0, seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_does_not_touch_the_global_generator_when_seeded(model):
    before = torch.get_rng_state()
    list(generate(model, PROMPT, 5, temperature=1.0, seed=3))
    assert torch.equal(before, torch.get_rng_state())


def test_is_streamed_and_leaves_the_callers_mode_alone(model):
    stream = generate(model, PROMPT, 10)
    first = next(stream)
    assert not torch.is_inference_mode_enabled()
    assert [first, *stream] == list(generate(model, PROMPT, 10))


def frequencies(logits, count=4000, **settings):
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**{"temperature": 1.0, **settings})
    values, ids = logits.topk(min(sampling.candidates or len(logits), len(logits)))
    drawn = torch.tensor([sampling.choose(values, ids, generator) for _ in range(count)])
    return torch.bincount(drawn, minlength=len(logits)) / count


P = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"top_k": 2}, torch.tensor([0, 4, 0, 3, 0]) / 7),
        ({"top_k": 99}, P),
        # 0.4 + 0.3 hold 0.7 and are the fewest that hold 0.65; 0.75 needs a third.
        ({"top_p": 0.65}, torch.tensor([0, 4, 0, 3, 0]) / 7),
        ({"top_p": 0.75}, torch.tensor([0, 40, 0, 30, 15]) / 85),
        ({"top_p": 1e-9}, torch.tensor([0.0, 1, 0, 0, 0])),
        # top-p looks at what top-k has left: 4/7 and 3/7.
        ({"top_k": 2, "top_p": 0.5}, torch.tensor([0.0, 1, 0, 0, 0])),
    ],
    ids=str,
)
def test_draws_with_the_right_probabilities(settings, expected):
    result = frequencies(P.log(), **settings)
    # Five standard deviations of the largest frequency: 5 * sqrt(0.25 / 4000).
    assert (result - expected).abs().max() < 0.04
    assert (result[expected == 0] == 0).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ids": []}, "ids: the prompt is empty"),
        ({"ids": [256]}, "ids: accepted are 0 to 255"),
        ({"ids": [-1]}, "ids: accepted are 0 to 255"),
        ({"ids": [0] * 513}, "ids: 513 tokens, the model takes 512"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **{"ids": PROMPT, **arguments})


def test_only_decoders_generate(tmp_path):
    tiny.bert(tmp_path)
    with pytest.raises(TypeError, match="model: got Encoder, expected a Decoder"):
        generate(memlm.load(tmp_path), PROMPT)


class Bytes:
    """The tokenizer's interface, one token per byte."""

    def __init__(self):
        self.backend = tiny.tokenizer()

    def encode(self, text):
        return self.backend.encode(text).ids

    def decode(self, ids):
        return self.backend.decode(ids)


def pieces_of(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [stream.push(i) for i in ids] + [stream.finish()]


def test_text_comes_one_whole_character_at_a_time():
    tokenizer = Bytes()
    text = "a né\n 鯨 🐋!"
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert [p for p in pieces if p] == list(text)
    assert pieces[-1] == ""


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_comes_back_whole(text):
    tokenizer = Bytes()
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    # Characters of more than one byte never come in part; U+FFFD itself may be in the text.
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_any_tokens_give_the_text_of_all_together(ids):
    tokenizer = Bytes()
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_unfinished_character_is_kept_for_the_end():
    tokenizer = Bytes()
    ids = tokenizer.encode("ab🐋")[:-1]
    assert pieces_of(tokenizer, ids) == ["a", "b", "", "", "", "\ufffd"]
    stream = TextStream(tokenizer)
    for i in ids:
        stream.push(i)
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


class Words:
    """A sentencepiece tokenizer's decoder: words carry their space in front, the first one of a
    text loses it, and rare characters are spelled in bytes."""

    PIECES = ["▁Call", "▁me", "\n", "▁Ishmael", ".", *(f"<0x{b:02X}>" for b in range(256))]

    def __init__(self):
        vocabulary = {piece: i for i, piece in enumerate(self.PIECES)}
        self.backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        self.backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def decode(self, ids):
        return self.backend.decode(ids)


def test_spaces_between_words_survive_a_line_break():
    tokenizer = Words()
    assert pieces_of(tokenizer, [0, 1, 2, 3, 4]) == ["Call", " me", "\n", " Ishmael", ".", ""]


def test_characters_spelled_in_bytes_come_whole():
    tokenizer = Words()
    spelled = [Words.PIECES.index(f"<0x{b:02X}>") for b in "🐋🐋".encode()]
    pieces = pieces_of(tokenizer, [0, *spelled, 4])
    assert pieces == ["Call", "", "", "", "🐋", "", "", "", "🐋", ".", ""]


@pytest.mark.models
def test_smollm2_knows_the_capital_of_france():
    model = memlm.load(data.smollm2_gguf(), dequantize=True)
    tokenizer = model.tokenizer
    ids = list(generate(model, tokenizer.encode("The capital of France is"), 2))
    assert "".join(pieces_of(tokenizer, ids)) == " Paris."
