"""The encoder against transformers, and sentence embeddings."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification

import memlm
from memlm import data

from . import tiny

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def padded_batch():
    ids = torch.randint(256, (3, 40), generator=torch.manual_seed(1))
    mask = torch.arange(40) < torch.tensor([[40], [1], [23]])
    return ids, mask


@pytest.fixture
def pair(tmp_path):
    theirs = tiny.bert(tmp_path)
    return memlm.load(tmp_path), theirs


def test_hidden_states_are_those_of_transformers(pair):
    ours, theirs = pair
    ids, mask = padded_batch()
    types = (torch.arange(40) > 20).long().expand(3, 40)
    with torch.inference_mode():
        for mine, hf in (
            ({}, {}),
            ({"mask": mask}, {"attention_mask": mask.long()}),
            ({"mask": mask.long(), "types": types},
             {"attention_mask": mask.long(), "token_type_ids": types}),
        ):  # fmt: skip
            result = ours(ids, **mine)
            expected = theirs(ids, **hf).last_hidden_state
            seen = mask if mine else torch.ones_like(mask)
            torch.testing.assert_close(result[seen], expected[seen], **CLOSE)


def test_padding_does_not_reach_the_tokens(pair):
    ours, _ = pair
    ids, mask = padded_batch()
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids, mask)[2, :23], ours(ids[2:, :23])[0], **CLOSE)
        other = torch.where(mask, ids, (ids + 1) % 256)
        torch.testing.assert_close(ours(other, mask)[mask], ours(ids, mask)[mask], **CLOSE)


def test_a_model_with_a_head_loads_as_its_encoder(tmp_path):
    theirs = tiny.bert(tmp_path, cls=BertForSequenceClassification)
    ids, _ = padded_batch()
    with torch.inference_mode():
        expected = theirs.bert(ids).last_hidden_state
        torch.testing.assert_close(memlm.load(tmp_path)(ids), expected, **CLOSE)


TEXTS = ["Call me Ishmael.", "a", "Some years ago, never mind how long precisely", "é" * 300, ""]


def byte_model(folder):
    theirs = tiny.bert(folder)
    backend = tiny.tokenizer()
    # As BERT's: every text gets a first and a last token.
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single="! $A !", special_tokens=[("!", backend.token_to_id("!"))]
    )
    backend.save(str(folder / "tokenizer.json"))
    return memlm.load(folder), theirs, backend


def expected_embedding(theirs, backend, text, limit):
    ids = backend.encode(text).ids
    if len(ids) > limit:
        ids = ids[: limit - 1] + ids[-1:]
    with torch.inference_mode():
        hidden = theirs(torch.tensor([ids])).last_hidden_state[0]
    return F.normalize(hidden.mean(0), dim=0)


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_embed_is_the_normalised_mean_over_each_text_alone(tmp_path, batch):
    ours, theirs, backend = byte_model(tmp_path)
    result = ours.embed(TEXTS, max_tokens=200, batch=batch)
    expected = torch.stack([expected_embedding(theirs, backend, t, 200) for t in TEXTS])
    torch.testing.assert_close(result, expected, **CLOSE)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(len(TEXTS)))


def test_quantised_embeddings_stay_near(tmp_path):
    ours, _, _ = byte_model(tmp_path)
    exact = ours.embed(TEXTS)
    memlm.quantize_(ours, memlm.QuantConfig("int8", "int8"), strict=True)
    assert (ours.embed(TEXTS) * exact).sum(1).min() > 0.999


@pytest.mark.parametrize("texts", [[], "one string"])
def test_bad_texts(tmp_path, texts):
    ours, _, _ = byte_model(tmp_path)
    with pytest.raises(ValueError, match="texts: expected a non-empty list"):
        ours.embed(texts)


def test_bad_arguments(pair):
    ours, _ = pair
    ids, mask = padded_batch()
    with pytest.raises(ValueError, match="without tokenizer.json"):
        ours.embed(["text"])
    with pytest.raises(ValueError, match="max_tokens, batch: got 2, 0"):
        ours.embed(["text"], max_tokens=2, batch=0)
    with pytest.raises(ValueError, match=r"mask: got shape \[3, 39\]"):
        ours(ids, mask[:, :39])
    with pytest.raises(ValueError, match=r"types: got shape \[40\]"):
        ours(ids, types=ids[0])
    for bad in (ids[0], ids[:, :0], torch.zeros(1, 513, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids: got shape"):
            ours(bad)


BAD = {
    "activation": ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    "positions": ({"position_embedding_type": "relative_key"}, "absolute"),
    "decoder": ({"is_decoder": True}, "is_decoder"),
    "heads": ({"num_attention_heads": 5}, "5 heads do not divide 64"),
    "types": ({"type_vocab_size": 0}, "type_vocab_size is 0"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_configs_that_are_not_computed_are_refused(tmp_path, changes, message):
    tiny.bert(tmp_path)
    tiny.edit_config(tmp_path, **changes)
    with pytest.raises(memlm.FormatError, match=message):
        memlm.load(tmp_path)


@pytest.mark.models
def test_minilm_is_that_of_transformers():
    from transformers import AutoModel, AutoTokenizer

    folder = data.minilm()
    theirs, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["A whale surfaced.", "The whale came up.", "Interest rates rose again this spring."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = theirs(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    expected = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)
    result = memlm.load(folder).embed(texts)
    torch.testing.assert_close(result, expected, **CLOSE)
    assert result[0] @ result[1] > 0.7 > 0.3 > result[0] @ result[2]
