"""Tokenizers: from a Hugging Face folder's tokenizer.json, or rebuilt from GGUF metadata."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from memlm.errors import FormatError
from memlm.io.files import replacing
from memlm.io.gguf import GGUF
from memlm.io.files import read_json

# tokenizer.ggml.pre -> what splits the text before byte-pair encoding.
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_TOKENIZER_FILE, _SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """Text to token ids and back.

    ``backend`` is the tokenizers.Tokenizer; ``eos_ids`` the ids that end a text; ``bos_id`` and
    ``chat_template`` are None where the model has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict):
        """``settings``: what tokenizer_config.json holds."""
        self.backend = backend
        self._settings = settings
        self._special = {  # "bos_token" -> its text; some files hold more than the text
            key: token.get("content") if isinstance(token, dict) else token
            for key, token in settings.items()
            if key.endswith("_token") and isinstance(token, (str, dict))
        }
        template = settings.get("chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        self.bos_id = self._id("bos_token")
        self.eos_ids = [i for i in [self._id("eos_token")] if i is not None]

    def _id(self, key: str) -> int | None:
        token = self._special.get(key)
        return self.backend.token_to_id(token) if isinstance(token, str) else None

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens added; those that stand in the text are recognised.
        Raises FormatError where the tokenizer has no token for a part of the text."""
        return self._run(self.backend.encode, text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the model expects around it."""
        return [encoded.ids for encoded in self._run(self.backend.encode_batch, list(texts))]

    def _run(self, method, *arguments, **settings):
        try:
            return method(*arguments, **settings)
        except Exception as error:
            if type(error) is not Exception:  # the library's about the file are plain ones
                raise
            raise FormatError(f"tokenizer: {error}") from None

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._run(self.backend.decode, ids, skip_special_tokens=skip_special)

    def apply_chat(self, messages: list[dict[str, str]]) -> str:
        """The model's prompt for ``[{"role": ..., "content": ...}, ...]``, up to where the answer
        starts.

        Templates come from model files: they run in jinja2's sandbox, with the few helpers that
        Hugging Face's templates expect.

        Raises ValueError where the model has no chat template, or where the template refuses the
        messages; FormatError for a broken template.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ValueError("messages: this model has no chat template")
        if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError(
                f"messages: got {messages!r:.80}, expected [{{'role': ..., 'content': ...}}, ...]"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=messages, add_generation_prompt=True, **self._special
            )
        except _Refusal as refusal:
            raise ValueError(f"messages: the chat template says: {refusal}") from None
        except Exception as error:  # jinja2's own, and whatever the template's expressions raise
            raise FormatError(f"chat template: {type(error).__name__}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
        with replacing(Path(folder) / _TOKENIZER_FILE) as file:
            file.write(self.backend.to_str(pretty=True).encode())
        with replacing(Path(folder) / _SETTINGS_FILE) as file:
            file.write(json.dumps(self._settings, indent=2, ensure_ascii=False).encode())


class _Refusal(Exception):
    """What a template raises about the messages."""


def _refuse(message: str):
    raise _Refusal(message)


def _to_json(value, indent: int | None = None) -> str:
    """jinja2's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file.

    Raises FileNotFoundError, or FormatError for what cannot be understood.
    """
    path = Path(path)
    if not path.is_dir():
        return from_gguf(GGUF(path))
    file = path / _TOKENIZER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path}: has no {_TOKENIZER_FILE}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise FormatError(f"{file}: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    settings = read_json(path / _SETTINGS_FILE) if (path / _SETTINGS_FILE).is_file() else {}
    if (path / _TEMPLATE_FILE).is_file():
        settings["chat_template"] = (path / _TEMPLATE_FILE).read_text("utf-8")
    elif isinstance(templates := settings.get("chat_template"), list):  # of named templates
        named = {t.get("name"): t.get("template") for t in templates if isinstance(t, dict)}
        settings["chat_template"] = named.get("default")
    return Tokenizer(backend, settings)


def from_gguf(file: GGUF) -> Tokenizer:
    """Rebuilds a byte-level BPE tokenizer from ``tokenizer.ggml.*``.

    Raises FormatError for other kinds of tokenizers and for metadata that do not fit together.
    """

    def error(reason: str) -> FormatError:
        return FormatError(f"{file.path}: tokenizer: {reason}")

    model, pre = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise error(
            f"model {model!r:.40} with pre-tokenizer {pre!r:.40}; read is 'gpt2' with one of "
            f"{', '.join(map(repr, PRE_TOKENIZERS))}"
        )

    def array(key: str, kind: type) -> list:
        values = file.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise error(f"{key} is no array of {kind.__name__}")
        return values

    tokens, types = array("tokens", str), array("token_type", int)
    merges = [tuple(merge.split(" ")) for merge in array("merges", str)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens):
        raise error(f"{len(tokens)} tokens, but {len(types)} token types")
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise error(f"the token {twice!r:.40} is there twice")
    if len(tokens) > file.config["vocab_size"]:
        raise error(f"{len(tokens)} tokens, but {file.config['vocab_size']} embeddings")
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise error(f"the merge {' '.join(merge)!r:.80} is not of two tokens into a third")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)

    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("bos_token", "eos_token"):
        index = file.config[f"{key}_id"]
        if index is not None:
            if index >= len(tokens):
                raise error(f"{key}_id is {index}, there are {len(tokens)} tokens")
            settings[key] = tokens[index]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return Tokenizer(backend, settings)
