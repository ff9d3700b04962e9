"""What a user gets back: `RequestOutput` and its parts, named as in vLLM.

What is made for every token is a `msgspec.Struct`: a frozen dataclass of as many fields takes twenty times as long to
make, and these were half of the host's time. `msgspec.structs.replace` makes a changed copy. None of them can be part
of a cycle, so that the garbage collector need not look at them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from engine.errors import RequestFailedError


@dataclass(frozen=True)
class Logprob:
    """One candidate token: natural-log probability under the raw distribution, 1-based rank, its text (None without
    tokenizer).
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # token id -> Logprob, for one position


class CompletionOutput(msgspec.Struct, frozen=True, gc=False):
    """One of the `n` completions of a request.

    Attributes:
        index: which of the n.
        text: the text so far (or the new text, with `RequestOutputKind.DELTA`).
        token_ids: likewise for the token ids, stop token included.
        cumulative_logprob: sum of the sampled tokens' logprobs; None unless logprobs were asked for.
        logprobs: one dict per token; None unless asked for.
        finish_reason: "stop", "length", "abort", "error", or None while running.
        stop_reason: the stop string or stop token id that ended it; None for EOS, length and abort.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """True once a finish reason is set."""
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct, frozen=True, gc=False):
    """When things happened, in seconds of `time.monotonic()`; None where it has not happened yet. An engine in a
    process of its own sends them with a request's last output only.

    With speculative decoding also how well it guessed: steps that verified drafts, drafts in them, and those that were
    right, of all completions. `accepted_per_pos`, with the last output, says how often the first, the second … draft of
    a step was right; () if there were no drafts.

    Linux has one monotonic clock for all processes, so that these times may be subtracted from those of another process
    of the same machine.
    """

    arrival_time: float
    queued_ts: float | None = None
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_pos: tuple[int, ...] = ()

    @property
    def first_token_latency(self) -> float | None:
        """Arrival to first token, in seconds (TTFT)."""
        return _between(self.arrival_time, self.first_token_ts)

    @property
    def queue_time_s(self) -> float | None:
        """Queued to first scheduled."""
        return _between(self.queued_ts, self.scheduled_ts)

    @property
    def prefill_time_s(self) -> float | None:
        """First scheduled to first token."""
        return _between(self.scheduled_ts, self.first_token_ts)

    @property
    def decode_time_s(self) -> float | None:
        """First to last token."""
        return _between(self.first_token_ts, self.last_token_ts)

    @property
    def inference_time_s(self) -> float | None:
        """First scheduled to last token."""
        return _between(self.scheduled_ts, self.last_token_ts)


def _between(start: float | None, stop: float | None) -> float | None:
    return None if start is None or stop is None else stop - start


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
    """The state of one request, as vLLM's `RequestOutput`; `embedding` is float32[E], the result of a pooled one."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None
    embedding: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EmbeddingOutput:
    """A pooled hidden state.

    Attributes:
        embedding: float32[E], L2-normalised unless that was not wanted.
        num_prompt_tokens, num_cached_tokens: of the prompt.
        metrics: when things happened.
    """

    request_id: str
    embedding: tuple[float, ...]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> EmbeddingOutput:
        """The result of a pooled request.

        Args:
            output: its last one.

        Raises:
            RequestFailedError: there is no result: a step failed, or the request was aborted.
        """
        if output.embedding is None:
            raise RequestFailedError(output.error or f"request {output.request_id!r} was aborted.")
        num_prompt_tokens, num_cached_tokens = len(output.prompt_token_ids), output.num_cached_tokens
        return cls(output.request_id, output.embedding, num_prompt_tokens, num_cached_tokens, output.metrics)


@dataclass(frozen=True)
class BeamSearchSequence:
    """One finished or best beam: all token ids (prompt included), its text and its cumulative logprob."""

    token_ids: tuple[int, ...]
    text: str | None
    cumulative_logprob: float
    finish_reason: str | None = None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The `beam_width` best sequences, best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)
