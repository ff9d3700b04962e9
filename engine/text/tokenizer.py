"""`Tokenizer`: one model's tokenizer, from a Hugging Face directory or out of a GGUF file, over `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders

from engine.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError, WeightsError
from engine.text.chat_template import Message, render_chat
from engine.text.token_bytes import ByteVocabulary
from models.loading.gguf_file import read_gguf
from models.loading.gguf_tokenizer import gguf_tokenizer

_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_EXTRA_LISTS = ("additional_special_tokens", "extra_special_tokens")
_OTHER_FORMATS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")


class Tokenizer:
    """Text ↔ token ids of one model. Immutable after construction, safe to use from several threads.

    Args:
        backend: the encoder; its truncation and padding are switched off.
        special_tokens: `bos_token`, `eos_token` and the like → text; also the variables that chat templates see.
        chat_templates: Jinja sources by name; the usual one is "default".
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates)
        self.added_tokens: dict[int, str] = {}
        special_ids = set()
        for token_id, token in backend.get_added_tokens_decoder().items():
            self.added_tokens[token_id] = token.content
            if token.special:
                special_ids.add(token_id)
        self.special_ids = frozenset(special_ids)

    @classmethod
    def from_directory(cls, path: Path | str) -> Tokenizer:
        """Read `tokenizer.json` with the configs and chat templates beside it.

        Raises:
            ModelNotFoundError: the directory has no tokenizer.
            UnsupportedModelError: it has one, but not as tokenizer.json.
            WeightsError: a file is corrupt.
        """
        directory = Path(path)
        backend = _read_backend(directory)
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens, extra = _special_tokens(directory, config)
        _declare_added(backend, config, [*special_tokens.values(), *extra])
        return cls(backend, special_tokens, _read_templates(directory, config))

    @classmethod
    def from_gguf(cls, path: Path | str) -> Tokenizer:
        """Rebuild the tokenizer that is inside a GGUF file.

        Raises:
            UnsupportedModelError: its kind or its splitting rule is not supported.
            WeightsError: the file is truncated or corrupt.
        """
        parts = gguf_tokenizer(read_gguf(path))
        return cls(parts.backend, parts.special_tokens, parts.chat_templates)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """From a GGUF file or a directory, whichever `path` is."""
        return cls.from_gguf(path) if Path(path).is_file() else cls.from_directory(path)

    def save(self, directory: Path) -> None:
        """Write what `from_directory` reads: `tokenizer.json` and `tokenizer_config.json`, chat templates included.

        Raises:
            OSError: the directory cannot be written.
        """
        self.backend.save(str(directory / "tokenizer.json"))
        templates = [{"name": name, "template": source} for name, source in self.chat_templates.items()]
        config = {**self.special_tokens, "chat_template": templates}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1), "utf-8")

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1. A model's own vocabulary may be larger: padded rows that no text leads to."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def byte_vocabulary(self) -> ByteVocabulary | None:
        """The bytes of each token, if this is a byte-level tokenizer; shared by all sequences."""
        return ByteVocabulary(self.backend) if isinstance(self.backend.decoder, decoders.ByteLevel) else None

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return self._special_id("bos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's own end token. Which ids end a generation is the model config's matter."""
        return self._special_id("eos_token")

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary (`Ġthe`, `<|im_end|>`), or None."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in the text count as such, as in transformers.

        Args:
            text: any text, empty too.
            add_special_tokens: add BOS, EOS … where this tokenizer does.

        Raises:
            InvalidRequestError: the text is not valid Unicode (it has lone surrogates).
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise InvalidRequestError(
                "prompt must be valid Unicode text; it has a lone surrogate (\\ud800 to \\udfff).", parameter="prompt"
            ) from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids, all at once; ids outside the vocabulary have none. Spaces are left as they are."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, for `Logprob.decoded_token`; U+FFFD for bytes that are no character."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation to text. Encode it with `add_special_tokens=False`: the template writes them itself.

        Args:
            messages: dicts with `role`, `content` and whatever else the template reads; plain data only.
            add_generation_prompt: end with the opening of an assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            chat_template: a Jinja source, or the name of one of the model's templates; default: "tool_use" if tools are
                given and there is one, else "default".
            variables: more variables of the template: `tools`, `documents`, `enable_thinking` …

        Raises:
            InvalidRequestError: there is no template, it refuses the messages, or the flags contradict each other.
        """
        source = self._template(chat_template, has_tools=bool(variables.get("tools")))
        return render_chat(
            source,
            messages,
            {**self.special_tokens, **variables},
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def _template(self, chosen: str | None, *, has_tools: bool) -> str:
        if chosen is not None:
            return self.chat_templates.get(chosen, chosen)
        if has_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" in self.chat_templates:
            return self.chat_templates["default"]
        names = ", ".join(self.chat_templates)
        hint = f"name one of its templates: {names}" if names else "it has none; give one, or use plain completions"
        raise InvalidRequestError(f"This model has no default chat template: {hint}.", parameter="chat_template")


def _read_backend(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise WeightsError(f"{file} cannot be read: {error}.") from error
    others = [name for name in _OTHER_FORMATS if (directory / name).is_file()]
    if others:
        raise UnsupportedModelError(
            f"{directory} has its tokenizer as {', '.join(others)}; supported: tokenizer.json. It can be made with "
            "transformers: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
        )
    raise ModelNotFoundError(f"{directory} has no tokenizer: tokenizer.json is missing.")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} must hold a JSON object, found {type(content).__name__}.")
    return content


def _text(token: Any) -> str | None:
    """The text of a token that a config gives as a string or as a dict of its properties."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _special_tokens(directory: Path, config: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Named special tokens, and those of the lists.

    As in transformers, special_tokens_map.json goes before a config that does not list the added tokens itself.
    """
    merged = dict(config)
    if "added_tokens_decoder" not in config:
        merged |= _read_json(directory / "special_tokens_map.json")
    named = {key: _text(value) for key, value in merged.items() if key.endswith("_token")}
    extra: list[str | None] = []
    for key in _EXTRA_LISTS:
        value = merged.get(key) or []
        if isinstance(value, dict):  # name → token
            named |= {name: _text(token) for name, token in value.items()}
        else:
            extra += [_text(token) for token in value]
    return {key: token for key, token in named.items() if token is not None}, [
        token for token in extra if token is not None
    ]


def _declare_added(backend: tokenizers.Tokenizer, config: dict[str, Any], special: Iterable[str]) -> None:
    """Add the tokens that only tokenizer_config.json lists, and mark as special what it names as such.

    A named token without any id stays out: transformers would give it an id for which the model has no embedding.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    for _, token in declared:
        if token["content"] not in known:
            flags = {flag: token[flag] for flag in _ADDED_FLAGS if flag in token}
            backend.add_tokens([AddedToken(token["content"], special=token.get("special", False), **flags)])
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for content in dict.fromkeys(special):
        token = added.get(content)
        if token is not None and not token.special:
            flags = {flag: getattr(token, flag) for flag in _ADDED_FLAGS}  # of tokenizers' type
            backend.add_special_tokens([AddedToken(content, special=True, **flags)])
        elif token is None and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _read_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name: files of their own count before the entry of tokenizer_config.json."""
    templates: dict[str, str] = {}
    main = directory / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text(encoding="utf-8")
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if templates:
        return templates
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, list):
        return {template["name"]: template["template"] for template in entry}
    return {}
