"""The bytes of each token of a byte-level tokenizer (GPT-2, Llama 3, Qwen, SmolLM …)."""

from __future__ import annotations

import contextlib

import tokenizers


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as visible characters, reversed (`bytes_to_unicode` in github.com/openai/gpt-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


class ByteVocabulary(dict[int, bytes]):
    """Token id → bytes, filled as tokens are met; ids outside the vocabulary have no bytes.

    Only for tokenizers whose decoder is `ByteLevel`: there the text of a sequence is its tokens' bytes, put together.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        self.whole: dict[int, str] = {}  # of the tokens met so far, those that are whole characters

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        try:
            found = bytes([_ALPHABET[char] for char in token])
        except KeyError:  # a token that was added to the vocabulary is spelled as it is
            found = token.encode()
        self[token_id] = found
        with contextlib.suppress(UnicodeDecodeError):
            self.whole[token_id] = found.decode()
        return found
