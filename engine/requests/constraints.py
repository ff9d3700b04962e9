"""Limits of the sampler that `SamplingParams` alone cannot check: they concern the tokens of bad words and what is left
to sample."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import InvalidRequestError
from engine.sampling_params import SamplingParams

MAX_BAD_WORD_TOKENS = 16
MAX_BAD_WORD_SEQUENCES = 256  # 128 words, each with and without the space before it


def check_constraints(
    params: SamplingParams, bad_word_ids: Sequence[Sequence[int]], stop_token_ids: Sequence[int]
) -> None:
    """Check that the sampler can hold the bad words and that some token may always be sampled.

    Args:
        params: of the request.
        bad_word_ids: token sequences that must not appear.
        stop_token_ids: all ids that end the request, EOS included.

    Raises:
        InvalidRequestError: a bad word is empty or has more than 16 tokens, there are more than 256, or
            allowed_token_ids holds
            only tokens that bad_words or min_tokens forbid.
    """
    for word in bad_word_ids:
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            message = f"bad_words may have 1 to {MAX_BAD_WORD_TOKENS} tokens each, got {len(word)}: {list(word)}."
            raise InvalidRequestError(message, parameter="bad_words")
    if len(bad_word_ids) > MAX_BAD_WORD_SEQUENCES:
        message = f"bad_words may be at most {MAX_BAD_WORD_SEQUENCES} token sequences, got {len(bad_word_ids)}."
        raise InvalidRequestError(message, parameter="bad_words")
    if params.allowed_token_ids is None:
        return
    left = set(params.allowed_token_ids) - {word[0] for word in bad_word_ids if len(word) == 1}
    if not left:
        raise InvalidRequestError("bad_words forbids every token of allowed_token_ids.", parameter="bad_words")
    if params.min_tokens > 0 and left <= set(stop_token_ids):
        message = f"min_tokens={params.min_tokens} forbids stop tokens, and allowed_token_ids leaves only stop tokens."
        raise InvalidRequestError(message, parameter="min_tokens")
