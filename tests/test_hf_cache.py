"""memlm.hf.PagedCache: what generate makes with it is what it makes with transformers' own."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama4 import Llama4TextConfig

import memlm
from tests import tiny
from tests.test_hf_attention import IDS, MODELS, PADDING, close, load

BLOCK = 32


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    cls, config, settings = MODELS[request.param]
    tiny.llama(tmp_path, cls, config, tie_word_embeddings=False, **settings)
    return tmp_path


@pytest.fixture
def model(tmp_path):
    tiny.llama(tmp_path)
    return load(tmp_path, "memlm")


def paged(model, dtype="f32", **options):
    return memlm.hf.PagedCache(model.config, dtype, BLOCK, **options)


def generate(model, cache, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": PADDING} | options
    return model.generate(IDS, cache=cache, **options)


@pytest.mark.parametrize("implementation", ["memlm", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.8}, {"prefill_chunk_size": 7}],
    ids=["greedy", "beams", "sampling", "chunks"],
)
def test_generates_the_same(folder, implementation, options):
    model = load(folder, implementation)
    expected = generate(load(folder, "eager"), None, **{**options, "prefill_chunk_size": None})
    cache = paged(model)
    assert torch.equal(generate(model, cache, **options), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1  # the last token was not read
    if implementation == "memlm":  # padding is not stored
        lengths = [cache.pages.length(s) for s in cache.sequences]
        assert sorted({cache.seen - n for n in lengths}) in ([0, 4], [0], [4])
    # Blocks before the windows are gone, where all layers have one.
    window = cache.pages.window
    blocks = -(-cache.seen // BLOCK)
    assert cache.pages.used_blocks <= len(cache.sequences) * (2 if window else blocks)


@pytest.mark.parametrize("dtype, off", [("f32", 1e-5), ("bf16", 2e-2), ("int8", 3e-2), ("int4", 0.4)])
@pytest.mark.parametrize("implementation", ["memlm", "eager"])
def test_logits_by_storage(folder, dtype, off, implementation):
    """Of several tokens and of one at a time; relative to the largest."""
    config = AutoConfig.from_pretrained(folder)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    # A little noise would choose others.  And it weighs them otherwise for a token or two, by much:
    # all tokens are judged together.
    settings = {"num_experts_per_tok": experts} if experts else {}
    size = torch.Tensor.norm if experts else lambda x: x.abs().max()
    model, eager = load(folder, implementation, **settings), load(folder, "eager", **settings)
    cache, logits = paged(model, dtype), []
    # Into a second block: the newest of int4 is not rounded.
    ids, padding = IDS.repeat(1, 3), torch.cat((PADDING, torch.ones(2, 38, dtype=torch.int64)), dim=1)
    with torch.inference_mode():
        whole = eager(ids, attention_mask=padding).logits
        for piece in (slice(0, 2), slice(2, 15), slice(15, 16), slice(16, 56), slice(56, 57)):
            mask = padding[:, : piece.stop]
            logits.append(model(ids[:, piece], attention_mask=mask, cache=cache, use_cache=True).logits)
    seen = padding.bool()
    error = size(torch.cat(logits, 1)[seen] - whole[seen]) / size(whole[seen])
    assert error < off and (dtype in ("f32", "bf16") or error > 1e-6)


def test_beams_copy_tables_not_blocks(model):
    cache = paged(model)
    with torch.inference_mode():
        model(IDS.repeat(1, 4)[:, :70], cache=cache)
    used = cache.pages.used_blocks
    cache.batch_repeat_interleave(3)
    assert len(cache.sequences) == 6 and cache.pages.used_blocks == used == 2 * 3
    cache.reorder_cache(torch.tensor([5, 0, 0, 1, 2, 3]))
    assert cache.pages.used_blocks == used and len(set(cache.sequences)) == 6
    step = torch.tensor([[1]] * 6)
    with torch.inference_mode():
        model(step, cache=cache)
    assert cache.pages.used_blocks == used + 4  # the last blocks, once for each row beyond one of each
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.pages.used_blocks == 3
    cache.reset()
    assert cache.pages.used_blocks == 0 and cache.seen == 0


def test_rows_follow_their_indices(model):
    cache, ids = paged(model), torch.cat((IDS, IDS.flip(1)))
    mask = torch.cat((PADDING, PADDING))
    order = torch.tensor([2, 0, 0, 3])
    with torch.inference_mode():
        model(ids[:, :15], attention_mask=mask[:, :15], cache=cache)
        cache.reorder_cache(order)
        got = model(ids[order, 15:], attention_mask=mask[order], cache=cache).logits
        whole = model(ids[order], attention_mask=mask[order]).logits[:, 15:]
    close(got, whole)


def test_crop(model):
    cache = paged(model)
    with torch.inference_mode():
        whole = model(IDS, attention_mask=PADDING).logits[:, 10:]
        model(IDS.flip(1)[:, :10], attention_mask=PADDING[:, :10], cache=cache)
        cache.crop(-10)
        assert cache.seen == 0
        model(IDS, attention_mask=PADDING, cache=cache)
        cache.crop(0)
        cache.crop(-9)
        assert [cache.pages.length(s) for s in cache.sequences] == [6, 10]
        close(model(IDS[:, 10:], attention_mask=PADDING, cache=cache).logits, whole)
    with pytest.raises(ValueError, match="tokens_to_remove: got 3"):
        cache.crop(3)


def test_assisted_generation(model, tmp_path):
    tiny.llama(tmp_path / "draft", num_hidden_layers=1)
    draft = load(tmp_path / "draft", "eager")
    expected = model.generate(IDS[1:], max_new_tokens=20, do_sample=False)
    cache = paged(model)
    got = model.generate(IDS[1:], max_new_tokens=20, do_sample=False, assistant_model=draft, cache=cache)
    assert torch.equal(got, expected)


def test_a_second_turn(model):
    """What one call of generate has read, the next finds."""
    cache = paged(model)
    first = model.generate(IDS, max_new_tokens=5, do_sample=False, cache=cache)
    longer = torch.cat((first, IDS[:, :7]), dim=1)
    expected = model.generate(longer, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(longer, max_new_tokens=5, do_sample=False, cache=cache), expected)


@pytest.mark.parametrize("dtype, share", [("bf16", 1), ("int8", 0.53), ("int4", 0.30)])
def test_bytes(dtype, share):
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )  # SmolLM2's
    cache = memlm.hf.PagedCache(config, dtype, blocks=8)
    dense = 30 * 2 * 3 * 64 * 2 * 64 * 8  # bf16, of 8 blocks of 64 tokens
    assert share * 0.95 * dense < cache.nbytes <= share * dense


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="chunked_attention"):
        memlm.hf.PagedCache(Llama4TextConfig(num_hidden_layers=4))
    with pytest.raises(ValueError, match="dtype: got 'fp8'"):
        paged(model, "fp8")
    cache = paged(model)
    with torch.inference_mode():
        model(IDS, cache=cache)
        with pytest.raises(ValueError, match="a batch of 1, the cache holds 2"):
            model(IDS[:1], cache=cache)
        full = torch.ones(2, 1, 3, 22, dtype=torch.bool)
        with pytest.raises(ValueError, match="attention_mask: a PagedCache knows"):
            model(IDS[:, :3], attention_mask=full, cache=cache)
        hidden = torch.ones(2, 20, dtype=torch.long)
        hidden[0, 12] = 0
        with pytest.raises(ValueError, match="attention_mask: a PagedCache knows"):
            model(IDS[:, :1], attention_mask=hidden, cache=cache)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="has changed since"):
            model(IDS[:, :1], cache=cache)
        few = paged(model, blocks=1)
        with pytest.raises(memlm.OutOfBlocks, match="the pool has 1 blocks"):
            model(IDS, cache=few)
