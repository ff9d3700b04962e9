"""Bad words as token sequences that must not appear."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import InvalidRequestError
from engine.text.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of each bad word, as vLLM forms them: at the beginning of a text, and after a space.

    The second form counts only if the space is part of the first token (other first token, same number of tokens);
    else the first form is in it already.

    Args:
        tokenizer: the model's.
        words: non-empty strings; spaces in front of a word are dropped.

    Returns:
        Non-empty id sequences.

    Raises:
        InvalidRequestError: a word is only spaces, or has no tokens.
    """
    sequences: list[tuple[int, ...]] = []
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if not bare:
            raise InvalidRequestError(f"bad_words must hold words with tokens, got {word!r}.", parameter="bad_words")
        sequences.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences.append(spaced)
    return tuple(sequences)
