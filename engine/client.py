"""`EngineClient`: what a server needs of an engine, wherever that engine runs.

Two implementations: `AsyncEngine` (a thread of this process) and `RemoteEngine` (a process of its own). Everything here
is plain values, so that it can cross a process border; nothing here imports jax.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.input_processor import Prompt
from engine.outputs import EmbeddingOutput, RequestOutput
from engine.pooling import Pooling
from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer

__all__ = [
    "EmbeddingOutput",
    "EngineClient",
    "EngineInfo",
    "Pooling",
    "RequestTimeline",
    "StepEvent",
]


@dataclass(frozen=True)
class EngineInfo:
    """What never changes while an engine runs.

    Attributes:
        model: the reference that it was loaded from.
        vocab_size: token ids are 0 to vocab_size - 1.
        embedding_size: E, length of a hidden state.
        max_model_len: prompt + output, in tokens.
        max_num_seqs: most sequences in one step.
        max_logprobs: most logprobs per position; -1 = all.
        eos_token_ids: ids that end a sequence.
        num_kv_blocks, block_size: size of the KV cache, in blocks, and of a block, in tokens.
        priorities: True if requests may bring a priority.
        default_sampling: what a request gets where it says nothing (the model's generation_config.json).
        description: `describe()`, for logs and people.
    """

    model: str
    vocab_size: int
    embedding_size: int
    max_model_len: int
    max_num_seqs: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]
    num_kv_blocks: int
    block_size: int
    priorities: bool
    default_sampling: SamplingParams
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepEvent:
    """One step of a request's timeline, or of the engine's.

    Attributes:
        step_id: of the engine's steps, from 0.
        time: when it was dispatched, seconds of `time.monotonic()` of the engine's process.
        duration_s: from dispatch to its tokens being read; None while it runs.
        num_tokens: tokens computed in it (of this request, or of all).
        num_seqs: sequences in it.
        num_prompt_tokens: how many of the tokens were of a prompt (a chunk).
        padded_tokens: rows of the bucket that it ran in, padding included.
    """

    step_id: int
    time: float
    duration_s: float | None
    num_tokens: int
    num_seqs: int
    num_prompt_tokens: int
    padded_tokens: int


@dataclass(frozen=True)
class RequestTimeline:
    """What happened to one request, live or lately ended. Times in seconds of `time.monotonic()`.

    Attributes:
        num_draft_tokens, num_accepted_tokens: guesses that were verified, and that were right.
        events: the steps that it was in (at most the newest some hundred).
    """

    request_id: str
    status: str
    arrival_time: float
    scheduled_ts: float | None
    first_token_ts: float | None
    finished_ts: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    finish_reason: str | None
    events: tuple[StepEvent, ...] = ()
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class EngineClient(Protocol):
    """An engine that is ready. All calls from one event loop."""

    @property
    def info(self) -> EngineInfo:
        """What never changes."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """A tokenizer of this process; None with `skip_tokenizer_init`. Encoding releases the GIL: use threads."""
        ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt, yielding as tokens come. Everything is checked before the first output; leaving the
        iterator early aborts the request. A consumer that is slower than the engine gets merged deltas: what waits for
        it is one output, never a queue.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: nothing was started.
            RequestFailedError: a step failed. EngineDeadError: the engine cannot go on.
        """
        ...

    async def embed(
        self, prompt: Prompt, *, pooling: Pooling = "last", normalize: bool = True, request_id: str | None = None
    ) -> EmbeddingOutput:
        """The pooled hidden states of a prompt, after the final norm.

        Raises:
            As `generate`.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish reason "abort"."""
        ...

    async def snapshot(self) -> dict[str, Any]:
        """Counters and gauges of this moment (`engine.snapshot`), as plain values."""
        ...

    async def recent_steps(self, since: int) -> list[StepEvent]:
        """The engine's steps with `step_id >= since`, of the newest some hundred."""
        ...

    async def timeline(self, request_id: str) -> RequestTimeline | None:
        """What happened to a request; None if it is not known (any more)."""
        ...

    async def check_health(self) -> None:
        """Return if a token can be made.

        Raises:
            EngineDeadError: it cannot (now): the engine stopped, or is being started again.
        """
        ...

    async def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""
        ...

    async def close(self) -> None:
        """Stop the engine; live streams get EngineDeadError."""
        ...
