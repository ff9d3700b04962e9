"""The tokenizer inside a GGUF file, rebuilt as a `tokenizers.Tokenizer`.

A GGUF file has the vocabulary, the merges (or scores) and a type for each token, but of the splitting rule only a name
(`tokenizer.ggml.pre`), and nothing of normalizer and decoder. Names are looked up here; the rules are those of the
original `tokenizer.json` files. A rule that is not here is refused: a similar one would give wrong ids without a word.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from models.errors import UnsupportedModelError, WeightsError
from models.loading.gguf_file import GgufFile

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


@dataclass(frozen=True)
class PreTokenizer:
    """One splitting rule of byte-level BPE.

    Attributes:
        make: builds it.
        ignore_merges: a piece that is a token is taken as it is, even where the merges would not lead there.
        add_bos: whether BOS is added where the file does not say (llama.cpp's default for this rule).
        nfc: text is brought to Unicode NFC first.
    """

    make: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_LLAMA3_RULE = PreTokenizer(lambda: _split(_LLAMA3), ignore_merges=True, add_bos=True)
_QWEN2_RULE = PreTokenizer(lambda: _split(_QWEN2), nfc=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(_gpt2),
    "gpt-2": PreTokenizer(_gpt2),
    "smollm": PreTokenizer(_smollm),
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "smaug-bpe": PreTokenizer(lambda: _split(_LLAMA3)),
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "tekken": PreTokenizer(lambda: _split(_TEKKEN), ignore_merges=True, add_bos=True),
}
"""By `tokenizer.ggml.pre`."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as its GGUF file describes it.

    Attributes:
        backend: encodes with BOS and EOS where the file wants them; no truncation, no padding.
        special_tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token` → text, as far as they exist.
        chat_templates: Jinja sources by name; the model's own is "default". Empty if there is none.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


def gguf_tokenizer(file: GgufFile) -> GgufTokenizer:
    """Rebuild the tokenizer of a GGUF file.

    Raises:
        UnsupportedModelError: its kind (`tokenizer.ggml.model`) or its splitting rule (`tokenizer.ggml.pre`) is not
            supported.
        WeightsError: the vocabulary is missing or contradicts itself.
    """
    metadata = file.metadata
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise WeightsError(f"{file.path.name} has no vocabulary ('tokenizer.ggml.tokens').")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise WeightsError(f"{file.path.name} is corrupt: token {twice!r} is in the vocabulary twice.")
    if kind == "gpt2":
        rule = _pre_tokenizer(file)
        backend, add_bos = _byte_level(file, vocabulary, rule), rule.add_bos
    elif kind == "llama":
        backend, add_bos = _sentence_piece(file, vocabulary), True
    else:
        raise UnsupportedModelError(
            f"{file.path.name} has a tokenizer of kind {kind!r}; supported: gpt2 (byte-level BPE), "
            "llama (SentencePiece BPE)."
        )
    types = _token_types(file, len(tokens))
    backend.add_special_tokens(_added(tokens, types, TokenType.CONTROL, special=True))
    backend.add_tokens(_added(tokens, types, TokenType.USER_DEFINED, special=False))
    special_tokens = _special_tokens(file, tokens)
    _add_post_processor(file, backend, special_tokens, add_bos_default=add_bos)
    return GgufTokenizer(backend, special_tokens, _chat_templates(metadata))


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedModelError(
            f"{file.path.name} splits text by the rule {name!r} ('tokenizer.ggml.pre'), which is not supported; "
            f"supported: {known}. Name a directory with the model's tokenizer.json as tokenizer instead."
        )
    return PRE_TOKENIZERS[name]


def _byte_level(file: GgufFile, vocabulary: dict[str, int], rule: PreTokenizer) -> Tokenizer:
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise WeightsError(f"{file.path.name} has no merges ('tokenizer.ggml.merges').")
    backend = Tokenizer(_bpe(file, vocabulary, [_halves(file, m) for m in merges], ignore_merges=rule.ignore_merges))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = rule.make()
    backend.decoder = decoders.ByteLevel()
    return backend


def _halves(file: GgufFile, merge: str) -> tuple[str, str]:
    """Token texts have no spaces (a space byte is written Ġ), so one space separates both halves."""
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise WeightsError(f"{file.path.name} is corrupt: merge {merge!r} is not two tokens with a space between.")
    return left, right


def _bpe(file: GgufFile, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # tokenizers raises bare Exception: a half or a product of a merge is no token
        raise WeightsError(f"{file.path.name} is corrupt: merges do not fit the vocabulary ({error}).") from error


def _sentence_piece(file: GgufFile, vocabulary: dict[str, int]) -> Tokenizer:
    """SentencePiece's BPE, as transformers converts it (`LlamaConverter`): a pair ranks by the score of its product."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise WeightsError(f"{file.path.name} has no score for each token ('tokenizer.ggml.scores').")
    types = _token_types(file, len(vocabulary))
    unknown = next((token for token, index in vocabulary.items() if types[index] == TokenType.UNKNOWN), None)
    mergeable = {token: index for token, index in vocabulary.items() if types[index] == TokenType.NORMAL}
    merges = _ranked_pairs(mergeable, scores)
    backend = Tokenizer(_bpe(file, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _ranked_pairs(mergeable: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best first: by score, then by the lengths of both halves, then by id."""
    ranked = []
    for token, index in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[index], -len(left), -len(right), index, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _token_types(file: GgufFile, count: int) -> list[int]:
    types = file.metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * count)
    if len(types) != count:
        raise WeightsError(f"{file.path.name} is corrupt: {len(types)} token types for {count} tokens.")
    return types


def _added(tokens: list[str], types: list[int], wanted: TokenType, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type == wanted
    ]


def _special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if index >= len(tokens):
            raise WeightsError(
                f"{file.path.name} is corrupt: the {name} token is {index}, ids are 0 to {len(tokens) - 1}."
            )
        special[f"{name}_token"] = tokens[index]
    return special


def _add_post_processor(file: GgufFile, backend: Tokenizer, special: dict[str, str], *, add_bos_default: bool) -> None:
    bos = special.get("bos_token") if file.metadata.get("tokenizer.ggml.add_bos_token", add_bos_default) else None
    eos = special.get("eos_token") if file.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys([bos, eos]) if token is not None]
    single = [bos, "$A", eos]
    pair = [bos, "$A", eos, bos and f"{bos}:1", "$B:1", eos and f"{eos}:1"]
    backend.post_processor = processors.TemplateProcessing(
        single=[part for part in single if part], pair=[part for part in pair if part], special_tokens=ids
    )


def _chat_templates(metadata: dict[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items() if key.startswith(f"{prefix}.")}
    return ({"default": metadata[prefix]} if prefix in metadata else {}) | named
