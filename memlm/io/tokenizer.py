"""Tokenizers: from a Hugging Face folder's tokenizer.json, or rebuilt from GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from memlm.errors import FormatError
from memlm.io.gguf import GGUF
from memlm.io.huggingface import read_json

# tokenizer.ggml.pre -> what splits the text before byte-pair encoding.
_PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class Tokenizer:
    """Text to token ids and back.

    ``backend`` is the tokenizers.Tokenizer; ``eos_ids`` the ids that end a text; ``bos_id`` and
    ``chat_template`` are None where the model has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict):
        self.backend = backend
        self._settings = settings  # what tokenizer_config.json holds
        self.chat_template: str | None = settings.get("chat_template")
        self.bos_id = self._id(settings.get("bos_token"))
        self.eos_ids = [i for i in [self._id(settings.get("eos_token"))] if i is not None]

    def _id(self, token) -> int | None:
        if isinstance(token, dict):
            token = token.get("content")
        return self.backend.token_to_id(token) if isinstance(token, str) else None

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens added; those that stand in the text are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def apply_chat(self, messages: list[dict[str, str]]) -> str:
        """The model's prompt for ``[{"role": ..., "content": ...}, ...]``, up to where the answer
        starts.  Templates come from model files, so they run in jinja2's sandbox.

        Raises ValueError where the model has no chat template, FormatError for a broken one.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ValueError("messages: this model has no chat template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        special = {k: v for k, v in self._settings.items() if k in ("bos_token", "eos_token")}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise FormatError(f"chat template: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(self._settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, "utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file.

    Raises FileNotFoundError, or FormatError for what cannot be understood.
    """
    path = Path(path)
    if not path.is_dir():
        return from_gguf(GGUF(path))
    file = path / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise FormatError(f"{file}: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    settings = path / "tokenizer_config.json"
    return Tokenizer(backend, read_json(settings) if settings.exists() else {})


def from_gguf(file: GGUF) -> Tokenizer:
    """Rebuilds a byte-level BPE tokenizer from ``tokenizer.ggml.*``."""

    def get(key: str, kind: type, default=None):
        value = file.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise FormatError(f"{file.path}: metadata tokenizer.ggml.{key} is missing or no {kind.__name__}")
        return value

    model, pre = get("model", str), get("pre", str, "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise FormatError(
            f"{file.path}: tokenizer {model!r} with pre-tokenizer {pre!r}; read are 'gpt2' with "
            f"one of {sorted(_PRE_TOKENIZERS)}"
        )
    tokens, types = get("tokens", list), get("token_type", list, [])
    merges = [tuple(m.split(" ", 1)) for m in get("merges", list) if isinstance(m, str)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or any(len(m) != 2 for m in merges):
        raise FormatError(f"{file.path}: tokens that are not unique, or malformed merges")
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # a merge of tokens that are not in the vocabulary
        raise FormatError(f"{file.path}: {error}") from None
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [t for t, k in zip(tokens, types) if k == kind]
        backend.add_tokens([AddedToken(t, normalized=False, special=special) for t in added])

    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, name in (("bos_token_id", "bos_token"), ("eos_token_id", "eos_token")):
        index = file.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(index, int) and 0 <= index < len(tokens):
            settings[name] = tokens[index]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return Tokenizer(backend, settings)
