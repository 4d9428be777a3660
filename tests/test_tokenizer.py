"""Tokenizers against transformers'; GGUF vocabularies and chat templates that are up to no good."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import memlm
from memlm import data
from memlm.io.tokenizer import Tokenizer, load_tokenizer

from . import tiny, tiny_gguf
from .tiny_gguf import TEXT, U32, array

FILE = "model.gguf"
TEXTS = [
    "", " ", "the moth", "  two\n\n\tlines ", "12,345.67 in 2024", "Ärger, 你好, 🙂 and e\u0301",
    "don't I'LL", "<|start|>user<|end|>", "a<|end|>b", "<|other|>", "x" * 300,
]  # fmt: skip
USER = [{"role": "user", "content": "Hi 42"}]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    tiny_gguf.write_llama(folder / FILE, tiny.llama(folder, vocab_size=300))
    return folder / FILE


def tokenizer(folder, **settings):
    folder.mkdir(exist_ok=True)
    backend = tiny.tokenizer()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def template(text, messages=None, **settings):
    return Tokenizer(tiny.tokenizer(), {"chat_template": text, **settings}).apply_chat(
        USER if messages is None else messages
    )


# --- from GGUF -----------------------------------------------------------------------------------


def test_gguf_tokens_are_the_files(gguf_file):
    ours, vocabulary = load_tokenizer(gguf_file), tiny_gguf.vocabulary()
    assert ours.vocab_size == len(vocabulary) == 256
    assert ours.bos_id == 0 and ours.eos_ids == [1]
    for text, pieces in {
        "the": ["th", "e"],
        "12th": ["1", "2", "th"],
        "a<|end|>": ["a", "<|end|>"],
        "é ": ["Ã", "©", "Ġ"],
    }.items():
        assert ours.encode(text) == [vocabulary.index(piece) for piece in pieces]


def test_digits_are_split_before_merging(tmp_path):
    """A merge of two digits, or of a digit and the space before it, never applies."""
    tokens = [*tiny_gguf.vocabulary()[:-3], "th", "12", "Ġ1"]
    model = tiny.llama(tmp_path, vocab_size=300)
    for pre, pieces in {"smollm": ["Ġ", "1", "2"], "gpt-2": ["Ġ1", "2"]}.items():
        path = tmp_path / f"{pre}.gguf"

        def edit(writer, pre=pre):
            del writer.kv_data[0]["tokenizer.ggml.merges"], writer.kv_data[0]["tokenizer.ggml.pre"]
            writer.add_tokenizer_pre(pre)
            writer.add_token_merges(["t h", "Ġ 1", "1 2"])

        tiny_gguf.write_llama(path, model, edit=edit, tokens=tokens)
        assert load_tokenizer(path).encode(" 12") == [tokens.index(piece) for piece in pieces]


def in_vocabulary(text):
    """Whether the small vocabulary, which lacks three of the 256 bytes, can hold the text."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return {byte for piece, _ in pieces for byte in piece} <= set(tiny_gguf.vocabulary())


@pytest.mark.parametrize("text", [*filter(in_vocabulary, TEXTS), "Ärger e\u0301"])
def test_text_comes_back(gguf_file, text):
    ours = load_tokenizer(gguf_file)
    assert ours.decode(ours.encode(text), skip_special=False) == text
    visible = text.replace("<|start|>", "").replace("<|end|>", "")
    assert ours.decode(ours.encode(text)) == visible


def test_what_is_saved_is_the_same_here_and_in_transformers(gguf_file, tmp_path):
    ours = load_tokenizer(gguf_file)
    ours.save(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    back, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert back.eos_ids == [theirs.eos_token_id] == ours.eos_ids
    assert back.bos_id == theirs.bos_token_id == ours.bos_id
    for text in TEXTS:
        ids = ours.encode(text)
        assert back.encode(text) == theirs.encode(text, add_special_tokens=False) == ids
        assert back.decode(ids) == ours.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    chat = theirs.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert back.apply_chat(USER) == ours.apply_chat(USER) == chat
    assert chat == "<|start|>user\nHi 42<|end|>\n<|start|>assistant\n"


def hostile(**changes):
    """A raw file whose tokenizer is a good one but for ``changes`` (None removes)."""
    fields = {
        "model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1],
        "merges": ["a b"], **changes,
    }  # fmt: skip
    texts = {f"tokenizer.ggml.{k}": (TEXT, v) for k, v in fields.items() if isinstance(v, str)}
    numbers = {f"tokenizer.ggml.{k}": (U32, v) for k, v in fields.items() if isinstance(v, int)}
    arrays = [
        array(f"tokenizer.ggml.{name}", TEXT if name != "token_type" else 0, values)
        for name, values in fields.items()
        if isinstance(values, list)
    ]
    return tiny_gguf.raw({**texts, **numbers}, keys=arrays)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'; read is 'gpt2' with .*'gpt-2', 'smollm'"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"model": "llama"}, "model 'llama' with"),
        ({"model": None}, "model None with"),
        ({"tokens": None}, "tokens is no array of str"),
        ({"tokens": "abc"}, "tokens is no array of str"),
        ({"merges": None}, "merges is no array of str"),
        ({"token_type": None}, "token_type is no array of int"),
        ({"token_type": [1, 1]}, "3 tokens, but 2 token types"),
        ({"tokens": ["a", "b", "a"]}, "the token 'a' is there twice"),
        ({"tokens": [f"t{i}" for i in range(33)], "token_type": [1] * 33},
         "33 tokens, but 32 embeddings"),
        ({"merges": ["ab"]}, "the merge 'ab' is not of two tokens"),
        ({"merges": ["a b c"]}, "the merge 'a b c' is not"),
        ({"merges": ["b a"]}, "the merge 'b a' is not of two tokens into a third"),
        ({"merges": ["a z"]}, "the merge 'a z' is not"),
        ({"merges": [" "]}, "the merge ' ' is not"),
        ({"eos_token_id": 3}, "eos_token_id is 3, there are 3 tokens"),
    ],
)  # fmt: skip
def test_vocabularies_that_do_not_fit(tmp_path, changes, message):
    (tmp_path / FILE).write_bytes(hostile(**changes))
    with pytest.raises(memlm.FormatError, match=f"{FILE}: tokenizer: .*{message}"):
        load_tokenizer(tmp_path / FILE)


def test_the_vocabulary_is_good_when_nothing_is_changed(tmp_path):
    (tmp_path / FILE).write_bytes(hostile(eos_token_id=2))
    ours = load_tokenizer(tmp_path / FILE)
    assert ours.encode("abba") == [2, 1, 0] and ours.eos_ids == [2] and ours.bos_id is None


# --- from a folder -------------------------------------------------------------------------------


def test_settings_may_hold_tokens_as_objects(tmp_path):
    eos = {"content": "</s>", "special": True, "__type": "AddedToken"}
    text = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    ours = tokenizer(tmp_path, bos_token="<s>", eos_token=eos, chat_template=text)
    assert ours.bos_id == 256 and ours.eos_ids == [257]
    assert ours.apply_chat(USER) == "<s>Hi 42</s>"
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).apply_chat(USER) == "<s>Hi 42</s>"


def test_templates_lie_where_transformers_puts_them(tmp_path):
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    assert tokenizer(tmp_path / "list", chat_template=named).apply_chat(USER) == "d"
    assert tokenizer(tmp_path / "none").chat_template is None
    file = tmp_path / "file"
    PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer(), chat_template="file").save_pretrained(file)
    assert (file / "chat_template.jinja").exists()
    assert load_tokenizer(file).apply_chat(USER) == "file"


def test_no_special_tokens_and_no_padding_are_added(tmp_path):
    backend = tiny.tokenizer(tmp_path)
    backend.enable_padding(length=10)
    backend.enable_truncation(3)
    backend.post_processor = tokenizers.processors.TemplateProcessing("! $A !", special_tokens=[("!", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("12345")) == 5


def test_missing_or_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="x.gguf"):
        load_tokenizer(tmp_path / "x.gguf")
    for text in ("", "{", "[]", '{"model": {"type": "Pickle"}}', "\xff"):
        (tmp_path / "tokenizer.json").write_text(text, "latin-1")
        with pytest.raises(memlm.FormatError, match="tokenizer.json: ."):
            load_tokenizer(tmp_path)
    tiny.tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(memlm.FormatError, match="tokenizer_config.json: expected a JSON object"):
        load_tokenizer(tmp_path)


def test_strange_settings_are_no_tokens(tmp_path):
    ours = tokenizer(tmp_path, eos_token=None, bos_token=5, chat_template=7, pad_token="not there")
    assert ours.eos_ids == [] and ours.bos_id is None
    with pytest.raises(ValueError, match="this model has no chat template"):
        ours.apply_chat(USER)


# --- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{%- for m in messages -%}\n  {{ m['role'] }}\n{%- endfor %}", "user"),
        ("{% if true %}\nkept\n{% endif %}\nend", "kept\nend"),  # trim_blocks, lstrip_blocks
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<b> & \'é\'"}]'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ strftime_now('%Y')|int > 2000 }}", "True"),
        ("{{ add_generation_prompt }}{{ nothing }}", "True"),
    ],
)
def test_templates_find_what_hugging_faces_expect(text, wanted):
    messages = [{"role": "user", "content": "<b> & 'é'"}]
    assert template(text, messages) == wanted
    theirs = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer(), chat_template=text)
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == wanted


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
        "{{ lipsum.__globals__['os'].system('touch FILE') }}",
        "{{ raise_exception.__globals__['json'].codecs.open('FILE', 'w') }}",
        "{{ strftime_now.__globals__['Path']('FILE').touch() }}",
        "{{ self._TemplateReference__context.environment.loader.x('FILE') }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ (messages|attr('__class__')).__mro__ }}",
        "{% include 'FILE' %}", "{% import 'os' as os %}{{ os.system('touch FILE') }}",
        "{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}",
        "{% if", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{ range(10 ** 9)|list }}", "{{ none + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)  # fmt: skip
def test_templates_run_in_a_sandbox(text, tmp_path):
    messages = [dict(USER[0])]
    with pytest.raises(memlm.FormatError, match="chat template: [A-Z][A-Za-z]*Error"):
        template(text.replace("FILE", str(tmp_path / "made")), messages)
    assert list(tmp_path.iterdir()) == [] and messages == USER


def test_messages_that_are_refused():
    with pytest.raises(ValueError, match="messages: the chat template says: roles must") as error:
        template("{{ raise_exception('roles must alternate') }}")
    assert not isinstance(error.value, memlm.FormatError)
    for messages in ([], "Hi", ["Hi"], [{"content": "Hi"}]):
        with pytest.raises(ValueError, match=r"messages: got .*, expected \[\{'role'"):
            template("x", messages)


# --- the real models -----------------------------------------------------------------------------


@pytest.mark.models
def test_smollm2_tokenizer(tmp_path):
    """Against transformers', whose rebuilt tokenizer lacks the digits: given to it here."""
    ours = load_tokenizer(data.smollm2_gguf())
    source = data.smollm2_gguf()
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert isinstance(theirs.backend_tokenizer.model, models.BPE)
    assert isinstance(theirs.backend_tokenizer.decoder, decoders.ByteLevel)
    text = data.moby_dick()[:200_000] + "".join(TEXTS) + "<|im_start|>user 1851<|im_end|>"
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special=False) == text
    assert ours.vocab_size == 49152 and ours.eos_ids == [2] and ours.bos_id == 1
    chat = theirs.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat(USER) == chat and chat.endswith("Hi 42<|im_end|>\n<|im_start|>assistant\n")
    assert ours.encode(chat)[0] == 1


@pytest.mark.models
def test_minilm_tokenizer():
    ours, theirs = load_tokenizer(data.minilm()), AutoTokenizer.from_pretrained(data.minilm())
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.backend.encode("Hi").ids == theirs.encode("Hi")  # [CLS] hi [SEP]
    assert ours.vocab_size == 30522 and ours.eos_ids == []


def test_a_text_without_tokens(tmp_path):
    """An empty vocabulary: FormatError; a mistake of the caller's stays what it is."""
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": []}}')
    tokenizer = load_tokenizer(tmp_path)
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(memlm.FormatError, match="tokenizer: .*unknown token"):
            call("a text")
    with pytest.raises(TypeError):
        tokenizer.encode(5)
