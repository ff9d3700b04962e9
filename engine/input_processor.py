"""From what a user says to a validated `Request`: everything is checked here, nothing after."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np

from engine.errors import ContextLengthError, InvalidRequestError
from engine.pooling import PoolingParams
from engine.requests.constraints import check_constraints
from engine.requests.request import Request
from engine.sampling_params import SamplingParams
from engine.text.bad_words import bad_word_ids
from engine.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; a mapping may also bring `cache_salt`."""


@dataclass(frozen=True)
class ModelLimits:
    """What a request is checked against.

    Attributes:
        vocab_size: ids are 0 to vocab_size - 1.
        max_model_len: prompt + output, in tokens.
        max_logprobs: most logprobs per position; -1 = all.
        eos_token_ids: ids that end a sequence.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]


class InputProcessor:
    """Makes requests. Holds only what never changes, and the generator of seeds."""

    def __init__(self, limits: ModelLimits, tokenizer: Tokenizer | None, seed: int) -> None:
        self.limits = limits
        self.tokenizer = tokenizer
        self._seeds = np.random.default_rng(seed)
        self._ids = itertools.count()

    def make(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0
    ) -> Request:
        """Check a prompt with its parameters and make the request.

        Raises:
            InvalidRequestError: empty prompt, ids out of the vocabulary, parameters that need a tokenizer there is
                none for, …
            ContextLengthError: the prompt leaves no room for an output.
        """
        arrival = time.monotonic()
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"sampling_params must be SamplingParams, got {params!r}.", "sampling_params")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError(f"priority must be an integer, got {priority!r}.", "priority")
        text, token_ids, salt = self._parse(prompt)
        params = self._bound(params, len(token_ids))
        eos, bad_words = () if params.ignore_eos else self.limits.eos_token_ids, self._bad_words(params)
        check_constraints(params, bad_words, (*(params.stop_token_ids or ()), *eos))
        return Request(
            request_id=self._name(request_id),
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=eos,
            bad_word_ids=bad_words,
            seed=params.seed if params.seed is not None else int(self._seeds.integers(-(2**63), 2**63)),
            priority=priority,
            cache_salt=salt,
            arrival_time=arrival,
        )

    def make_pooled(self, prompt: Prompt, pooling: PoolingParams, *, request_id: str | None = None) -> Request:
        """Check a prompt and make a request that is only pooled.

        Raises:
            InvalidRequestError: as `make`.
            ContextLengthError: the prompt is longer than `max_model_len`.
        """
        arrival = time.monotonic()
        name = self._name(request_id)
        text, token_ids, salt = self._parse(prompt)
        if len(token_ids) > self.limits.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self.limits.max_model_len} tokens. However, your prompt "
                f"contains {len(token_ids)} tokens."
            )
        return Request(
            request_id=name,
            prompt=text,
            prompt_token_ids=token_ids,
            params=pooling.sampling,
            eos_token_ids=(),
            bad_word_ids=(),
            seed=0,
            priority=0,
            cache_salt=salt,
            arrival_time=arrival,
            pooling=pooling,
        )

    def _name(self, request_id: str | None) -> str:
        if request_id is None:
            return f"req-{next(self._ids)}"
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequestError(f"request_id must be a non-empty string, got {request_id!r}.", "request_id")
        return request_id

    def _parse(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...], str | None]:
        salt = None
        if isinstance(prompt, Mapping):
            known = {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown := sorted(set(prompt) - known):
                raise InvalidRequestError(
                    f"a prompt mapping has unknown keys {unknown}; it may have {sorted(known)}.", "prompt"
                )
            salt = prompt.get("cache_salt")
            if salt is not None and (not isinstance(salt, str) or not salt):
                raise InvalidRequestError(f"cache_salt must be a non-empty string, got {salt!r}.", "cache_salt")
            if "prompt_token_ids" in prompt:
                if not isinstance(text := prompt.get("prompt"), (str, NoneType)):
                    message = f"the prompt beside prompt_token_ids must be text, got {text!r}."
                    raise InvalidRequestError(message, "prompt")
                return text, self._check_ids(prompt["prompt_token_ids"]), salt
            if "prompt" not in prompt:
                raise InvalidRequestError("a prompt mapping needs 'prompt' or 'prompt_token_ids'.", "prompt")
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._check_ids(self._encode(prompt)), salt
        return None, self._check_ids(prompt), salt

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError(
                "a text prompt needs a tokenizer; this engine has none (skip_tokenizer_init): pass token ids.", "prompt"
            )
        return self.tokenizer.encode(text)

    def _check_ids(self, ids: Any) -> tuple[int, ...]:
        if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
            raise InvalidRequestError(
                f"a prompt must be text or a list of token ids, got {type(ids).__name__}.", "prompt"
            )
        if len(ids) == 0:
            raise InvalidRequestError("the prompt must not be empty.", "prompt")
        size, checked = self.limits.vocab_size, []
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise InvalidRequestError(f"token ids must be integers, got {token!r}.", "prompt")
            if not 0 <= token < size:
                raise InvalidRequestError(
                    f"token id {token} is not in the vocabulary: ids are 0 to {size - 1}.", "prompt"
                )
            checked.append(int(token))
        return tuple(checked)

    def _bound(self, params: SamplingParams, prompt_len: int) -> SamplingParams:
        """Check the parameters against the model; cap max_tokens to what the context leaves."""
        limits = self.limits
        params.check_vocabulary(limits.vocab_size, limits.max_logprobs)
        if self.tokenizer is None and (params.stop or params.bad_words):
            name = "stop" if params.stop else "bad_words"
            raise InvalidRequestError(f"{name} needs a tokenizer; this engine has none (skip_tokenizer_init).", name)
        if self.tokenizer is None and params.structured_outputs is not None:
            raise InvalidRequestError(
                "structured_outputs needs a tokenizer; this engine has none (skip_tokenizer_init).",
                "structured_outputs",
            )
        room = limits.max_model_len - prompt_len
        if room < 1:
            raise ContextLengthError(
                f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
                f"{prompt_len} tokens, which leaves no room for an output. "
                f"Shorten the prompt to at most {limits.max_model_len - 1} tokens."
            )
        wanted = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > wanted:
            raise InvalidRequestError(
                f"min_tokens={params.min_tokens} exceeds the {wanted} tokens that can follow this prompt.", "min_tokens"
            )
        return params if wanted == params.max_tokens else params.replace(max_tokens=wanted)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        assert self.tokenizer is not None, "checked in _bound"
        return bad_word_ids(self.tokenizer, params.bad_words)
