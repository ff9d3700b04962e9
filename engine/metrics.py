"""Counters and times of an engine, as plain values. `serving` gives them their Prometheus names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.scheduling.plan import StepPlan


@dataclass
class EngineStats:
    """Totals since the start. Times in seconds.

    Attributes:
        num_steps, num_tokens: dispatched steps, and tokens computed in them (prompt and output).
        num_padded_tokens: rows of the buckets that those steps ran in; what exceeds num_tokens was padding.
        step_tokens: tokens of a step -> number of steps; at most `max_num_batched_tokens` keys.
        num_requests, num_rejected: requests that were queued, and that found the queue full.
        prompt_tokens, cached_prompt_tokens: of sequences that got their first token, and how many of those tokens came
            out of the prefix cache.
        generation_tokens: tokens that sequences got.
        finished: finish reason -> number of sequences.
        num_failed_steps: steps that raised.
        num_drafts, num_draft_tokens, num_accepted_tokens: how often a sequence had drafts in a step, how many they
            were, and how many were right.
        accepted_at: [place], how often the draft in that place was right.
        plan_s, dispatch_s, collect_s, commit_s: host time in each part of the loop; collect includes waiting for the
            device.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    step_tokens: Counter[int] = field(default_factory=Counter)
    num_requests: int = 0
    num_rejected: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    num_failed_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    plan_s: float = 0.0
    dispatch_s: float = 0.0
    collect_s: float = 0.0
    commit_s: float = 0.0

    def on_arrival(self, request: Request) -> None:
        """A request was queued."""
        self.num_requests += 1

    def on_dispatch(self, plan: StepPlan, padded_tokens: int, plan_s: float, dispatch_s: float) -> None:
        """A step was planned and dispatched, in a bucket of `padded_tokens` rows."""
        num_tokens = plan.num_tokens
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.num_padded_tokens += padded_tokens
        self.step_tokens[num_tokens] += 1
        self.plan_s += plan_s
        self.dispatch_s += dispatch_s

    def on_drafts(self, plan: StepPlan, tokens: list[list[int]]) -> None:
        """A step that verified drafts was read; `tokens` are what its items got."""
        for item, got in zip(plan.items, tokens, strict=True):
            if item.drafts:
                self.num_drafts += 1
                self.num_draft_tokens += len(item.drafts)
                self.num_accepted_tokens += len(got) - 1
                self.accepted_at += [0] * (len(item.drafts) - len(self.accepted_at))
                for place in range(len(got) - 1):
                    self.accepted_at[place] += 1

    def on_commit(self, collect_s: float, commit_s: float) -> None:
        """A step was read and its tokens delivered."""
        self.collect_s += collect_s
        self.commit_s += commit_s

    def on_first_token(self, sequence: Sequence) -> None:
        """A sequence's prompt is computed."""
        self.prompt_tokens += sequence.num_prompt_tokens
        self.cached_prompt_tokens += sequence.num_cached_tokens

    def on_finish(self, sequences: Iterable[Sequence]) -> None:
        """A request ended."""
        for sequence in sequences:
            self.finished[str(sequence.finish_reason)] += 1
