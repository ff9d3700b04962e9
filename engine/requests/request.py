"""`Request`: one prompt with its parameters, frozen; everything a user said, already checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from engine.pooling import PoolingParams
from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """One validated request.

    Attributes:
        request_id: unique among the running requests.
        prompt: the text, or None if token ids were given.
        prompt_token_ids: at least one id, all in the vocabulary.
        params: validated; `max_tokens` is already capped to what `max_model_len` leaves.
        eos_token_ids: ids that end a sequence with reason "stop"; empty when `ignore_eos`.
        bad_word_ids: token sequences that must not appear.
        seed: the request's own seed, or the one the engine drew for it; 64 bits, signed.
        priority: lower goes first (only with the priority policy).
        cache_salt: requests with different salts never share KV blocks.
        arrival_time: seconds, `time.monotonic()`.
        pooling: how its hidden states are pooled; None = it generates. A pooled request has `params` of one token,
            which is never sampled: its prompt may be `max_model_len` long.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    bad_word_ids: tuple[tuple[int, ...], ...]
    seed: int
    priority: int
    cache_salt: str | None
    arrival_time: float
    pooling: PoolingParams | None = None

    # Cached: each is asked for several times per token.

    @cached_property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.prompt_token_ids)

    @cached_property
    def max_tokens(self) -> int:
        """Most tokens each completion may have."""
        assert self.params.max_tokens is not None, "the input processor caps max_tokens"
        return self.params.max_tokens
