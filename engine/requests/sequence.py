"""`Sequence`: one completion on its way, the one mutable record of the engine.

A sequence has *known* tokens (prompt, outputs read from the device, and pending outputs: sampled by a step that the
host has not read yet) and *computed* tokens (whose keys and values are in the cache, or will be when the dispatched
steps have run). Each step gives it some tokens so that computed catches up with known; when it catches up fully, the
step samples the next one. There are no phases: prefill, decode, recomputation after preemption are the same thing.
Drafts are guesses of tokens to come: a step that computes them samples after each, and those that were right are known.
Until the host has read how many were, all counts are as if all were.

    tokens    [ prompt ........ | outputs ....... | pending ]
    computed  [ ======================>             ]
                                  ^ num_computed      ^ num_known
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.outputs import TokenLogprobs
from engine.requests.request import Request
from engine.structured.matcher import GrammarMatcher


class SequenceStatus(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(eq=False)
class Sequence:
    """One of the n completions of a request.

    Attributes:
        request: what was asked.
        index: which of the n.
        arrival: a counter that the scheduler gives; breaks ties in every order.
        most_known: known tokens at which it wants no more; the scheduler sets it.
        status: where it stands.
        num_computed: tokens whose KV is in the cache once all dispatched steps have run.
        num_pending: outputs sampled by dispatched steps that the host has not read yet (0 or 1 with overlap, and as
            many more as drafts are being verified).
        num_pending_drafts: drafts that dispatched steps verify.
        draft_token_ids: drafts for the next step.
        num_drafted, num_accepted: drafts that were verified, and that were right.
        accepted_runs: [n] = steps of which the first n drafts, and no more, were right; [] as long as it had none.
        output_token_ids: outputs read so far.
        block_table: ids of the KV blocks, in order of the tokens.
        block_hashes: chained hashes of the full blocks of known tokens, as far as computed.
        num_cached_blocks: leading blocks of the table that are registered under their hash.
        row: the row of the device state that it owns while running; None otherwise.
        num_sent_blocks: leading entries of the block table that the device already has in that row.
        num_cached_tokens: prompt tokens found in the prefix cache at first admission.
        num_preemptions: how often it lost its blocks.
        matcher: where it stands in its grammar, if it follows one: all of `output_token_ids` are accepted.
        finish_reason, stop_reason: set once, by `finish`.
    """

    request: Request
    index: int = 0
    arrival: int = 0
    most_known: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_pending: int = 0
    num_pending_drafts: int = 0
    draft_token_ids: tuple[int, ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_runs: list[int] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float = 0.0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_blocks: int = 0
    row: int | None = None
    num_sent_blocks: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    matcher: GrammarMatcher | None = None
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return self.request.num_prompt_tokens

    @property
    def num_outputs(self) -> int:
        """Outputs sampled so far, those included that the host has not read yet."""
        return len(self.output_token_ids) + self.num_pending

    @property
    def num_known(self) -> int:
        """Tokens that exist, on the host or (pending) on the device."""
        return self.request.num_prompt_tokens + len(self.output_token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens that computed lacks to catch up with known; 1 for a sequence in the middle of its output."""
        return self.num_known - self.num_computed

    @property
    def finished(self) -> bool:
        """True once it will get no more tokens."""
        return self.status is SequenceStatus.FINISHED

    @property
    def wants_tokens(self) -> bool:
        """False when all its tokens are sampled or in flight: it only waits to be read."""
        return self.num_outputs < self.request.max_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known tokens of positions `[start, stop)`; positions that are still pending on the device are -1."""
        prompt, length = self.request.prompt_token_ids, self.num_prompt_tokens
        tokens = list(prompt[start : min(stop, length)])
        if stop > length:
            outputs = self.output_token_ids[max(0, start - length) : stop - length]
            tokens += outputs
            tokens += [-1] * (stop - max(start, length) - len(outputs))
        return tokens
