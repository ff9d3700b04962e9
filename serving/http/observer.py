"""`Observer`: who wants to know of each request (metrics, logs, spans), off the hot path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestStart:
    """A request that was accepted.

    Attributes:
        request_id, endpoint, model: as the client sees them.
        params: None for embeddings.
        num_prompt_tokens: of the prompt.
        time: `time.monotonic()`.
        trace_parent: the W3C `traceparent` header, if there was one.
    """

    request_id: str
    endpoint: str
    model: str
    params: SamplingParams | None
    num_prompt_tokens: int
    time: float
    trace_parent: str | None = None


@dataclass(frozen=True)
class RequestEnd:
    """How a request ended.

    Attributes:
        finish_reasons: of its completions; "abort" if the client left.
        status: the HTTP status it was (or would have been) answered with.
        output: the last output, with the engine's metrics; None if there was none.
        num_output_tokens: of all completions.
        first_token_s, e2e_s: seconds from `RequestStart.time`; the first is None without a token.
        error: message, if it failed.
    """

    request_id: str
    finish_reasons: tuple[str, ...]
    status: int
    output: RequestOutput | None
    num_output_tokens: int
    first_token_s: float | None
    e2e_s: float
    error: str | None = None


class Observer(Protocol):
    """Told of every request. Must return at once."""

    def on_start(self, start: RequestStart) -> None:
        """A request was accepted."""
        ...

    def on_tokens(self, request_id: str, num_tokens: int, time: float) -> None:
        """An output with new tokens arrived."""
        ...

    def on_end(self, end: RequestEnd) -> None:
        """A request ended, in whatever way; exactly once per start."""
        ...

    def on_rejected(self, endpoint: str, status: int, reason: str) -> None:
        """A request was refused before it was accepted."""
        ...
