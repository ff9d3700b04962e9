"""Incremental detokenization: token ids of one sequence in, pieces of text out, never half a character.

The pieces sum up to what decoding prompt and output at once gives after the prompt's own text. Two ways lead there:

- `ByteDetokenizer`, for byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM …): a token *is* a string of bytes whatever its
  neighbours are, so an incremental UTF-8 decoder is exact, and never holds more than three bytes.
- `StreamDetokenizer`, for all other decoders (SentencePiece: spaces depend on neighbours), over `tokenizers`'
  `DecodeStream`.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Sequence
from typing import Protocol

from tokenizers.decoders import DecodeStream

from engine.text.token_bytes import ByteVocabulary
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_REPLACEMENT = "\ufffd"
_MIN_TAIL = 4  # prompt tokens that the stream sees first, so that spaces before the first output token are right
_MAX_TAIL = 24
# A character has at most four bytes: after this many tokens without a whole one, the bytes are broken, not incomplete.
_MAX_PENDING = 16
_INVALID_PREFIX = "Invalid prefix encountered"


class Detokenizer(Protocol):
    """One sequence's way from token ids to text."""

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often empty, never with half a character at its end."""
        ...

    def finish(self) -> str:
        """What is left when no token follows: bytes that never became a character, as the decoder writes them."""
        ...


class ByteDetokenizer:
    """Detokenization of byte-level BPE.

    Args:
        vocabulary: of the sequence's tokenizer.
        skipped: ids that have no text.
        prompt_token_ids: a character that begins at the end of the prompt comes out whole with the first output.
    """

    def __init__(self, vocabulary: ByteVocabulary, skipped: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._clean = True  # the decoder holds no bytes of a character that has begun
        for token_id in prompt_token_ids[-_MIN_TAIL:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped:
            return ""
        if self._clean:
            text = self._vocabulary.whole.get(token_id)
            if text is not None:
                return text
        text = self._decoder.decode(self._vocabulary[token_id])
        self._clean = not self._decoder.getstate()[0]
        return text

    def finish(self) -> str:
        """See `Detokenizer`."""
        self._clean = True
        return self._decoder.decode(b"", final=True)


class StreamDetokenizer:
    """Detokenization with `tokenizers`' `DecodeStream`.

    Broken bytes (not only incomplete ones) can make the text of earlier tokens change after the fact; text that was
    given out stays, and the stream goes on from the next token.

    Args:
        tokenizer: of the sequence.
        skipped: ids that have no text.
        prompt_token_ids: their tail decides whether the output begins with a space.
        spaces_between_special: False = added tokens in a row are given as they are spelled, without the decoder's
            spaces.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skipped: frozenset[int],
        prompt_token_ids: Sequence[int],
        spaces_between_special: bool = True,
    ) -> None:
        self._backend = tokenizer.backend
        self._skipped = skipped
        self._glued = {} if spaces_between_special else tokenizer.added_tokens
        self._last_was_added = False
        self._stream = DecodeStream(skip_special_tokens=False)
        self._context: list[int] = []  # tokens of the last text given out
        self._pending: list[int] = []  # tokens since then
        self._of_prompt = ""
        for token_id in self._prompt_tail(prompt_token_ids):
            self.push(token_id)
        # The stream holds back a U+FFFD at the prompt's end, which may become a character; else it is not output.
        self._of_prompt = self._remainder() if self._pending else ""

    def _prompt_tail(self, prompt_token_ids: Sequence[int]) -> Sequence[int]:
        """The shortest tail that begins with a whole character."""
        for length in range(_MIN_TAIL, min(len(prompt_token_ids), _MAX_TAIL)):
            tail = prompt_token_ids[-length:]
            if not self._decode(tail).startswith(_REPLACEMENT):
                return tail
        return prompt_token_ids[-_MAX_TAIL:]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        # The stream keeps what has no text, and would decode it again and again.
        if token_id in self._skipped or self._backend.id_to_token(token_id) is None:
            return ""
        self._pending.append(token_id)
        text = self._step(token_id)
        if text is None and len(self._pending) > _MAX_PENDING:
            text = self._remainder()
            self._stream = DecodeStream(ids=self._context, skip_special_tokens=False)
        if text is not None:
            self._context, self._pending = self._pending, []
            text, self._of_prompt = text.removeprefix(self._of_prompt), ""
        is_added = token_id in self._glued
        if is_added and self._last_was_added:
            text = self._glued[token_id]
        self._last_was_added = is_added
        return text or ""

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._backend, token_id)
        except Exception as error:  # tokenizers raises bare Exception
            if not str(error).startswith(_INVALID_PREFIX):
                raise
        logger.debug("text of earlier tokens changed after token %d; the stream starts afresh", token_id)
        self._stream = DecodeStream(ids=[token_id], skip_special_tokens=False)
        text = self._decode(self._pending)
        if text.endswith(_REPLACEMENT):  # the new stream does not take such a beginning as given
            self._stream = DecodeStream(skip_special_tokens=False)
        return text

    def _remainder(self) -> str:
        """The text of the pending tokens, after that of the tokens before."""
        before, whole = self._decode(self._context), self._decode([*self._context, *self._pending])
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._pending)

    def finish(self) -> str:
        """See `Detokenizer`."""
        text = self._remainder().removeprefix(self._of_prompt) if self._pending else ""
        self._pending = []
        return text


def make_detokenizer(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> Detokenizer:
    """The detokenizer of one sequence.

    Args:
        tokenizer: the model's.
        prompt_token_ids: what comes before the output.
        skip_special_tokens: special tokens have no text.
        spaces_between_special_tokens: with special tokens shown, whether the decoder may put spaces between them;
            byte-level decoders never do.
    """
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
    vocabulary = tokenizer.byte_vocabulary
    if vocabulary is not None:
        return ByteDetokenizer(vocabulary, skipped, prompt_token_ids)
    spaces = skip_special_tokens or spaces_between_special_tokens
    return StreamDetokenizer(tokenizer, skipped, prompt_token_ids, spaces)
