"""`Timeline`: what happened to each request and in each step, in rings of bounded size. No jax.

The hot path is one loop per step: three appends per sequence to rings that hold only references and small integers, so
that the garbage collector finds nothing new to walk. Records for the reader are made when somebody reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace

from engine.client import RequestTimeline, StepEvent
from engine.requests.request import Request
from engine.requests.sequence import Sequence, SequenceStatus
from engine.scheduling.plan import StepPlan

MOST_STEPS = 1024  # of the engine
MOST_EVENTS = 256  # of a request
MOST_ENDED = 1000  # requests


@dataclass(slots=True, eq=False)
class _Step:
    """A step of the engine. Fields as in `StepEvent`."""

    step_id: int
    time: float
    num_seqs: int
    padded_tokens: int
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    duration_s: float | None = None


class _Events:
    """The newest steps of one request; with n > 1, one entry per completion."""

    __slots__ = ("counts", "num_prompt_tokens", "prompts", "sequences", "steps")

    def __init__(self, num_prompt_tokens: int, sequences: tuple[Sequence, ...]) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.sequences = sequences
        self.steps: deque[_Step] = deque(maxlen=MOST_EVENTS)
        self.counts: deque[int] = deque(maxlen=MOST_EVENTS)
        self.prompts: deque[int] = deque(maxlen=MOST_EVENTS)

    def of_steps(self) -> tuple[StepEvent, ...]:
        """One event per step, the request's own tokens in it."""
        merged: dict[int, StepEvent] = {}
        for step, count, prompt in zip(self.steps, self.counts, self.prompts, strict=True):
            event = merged.get(step.step_id)
            merged[step.step_id] = (
                StepEvent(step.step_id, step.time, step.duration_s, count, step.num_seqs, prompt, step.padded_tokens)
                if event is None
                else replace(
                    event,
                    num_tokens=event.num_tokens + count,
                    num_prompt_tokens=event.num_prompt_tokens + prompt,
                )
            )
        return tuple(merged.values())


class Timeline:
    """Written by the engine's thread, read between two steps by the same thread.

    Keeps the newest `MOST_STEPS` steps, and of each request the newest `MOST_EVENTS`; requests that ended stay until
    `MOST_ENDED` others have ended after them.
    """

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque(maxlen=MOST_STEPS)
        self._live: dict[str, _Events] = {}
        self._ended: dict[str, tuple[RequestTimeline, _Events]] = {}  # in order of their end

    def open(self, request: Request, sequences: Several[Sequence]) -> None:
        """A request was queued."""
        self._live[request.request_id] = _Events(request.num_prompt_tokens, tuple(sequences))

    def on_dispatch(self, plan: StepPlan, now: float, padded_tokens: int) -> None:
        """A step was dispatched.

        Args:
            now: seconds, `time.monotonic()`.
            padded_tokens: rows of its bucket.
        """
        step = _Step(plan.step_id, now, len(plan.items), padded_tokens)
        live, total, total_prompt = self._live, 0, 0
        for item in plan.items:
            events, count = live[item.sequence.request.request_id], item.num_tokens
            left = events.num_prompt_tokens - item.start
            prompt = 0 if left <= 0 else min(left, count)
            events.steps.append(step)
            events.counts.append(count)
            events.prompts.append(prompt)
            total += count
            total_prompt += prompt
        step.num_tokens, step.num_prompt_tokens = total, total_prompt
        self._steps.append(step)

    def on_collected(self, step_id: int, now: float) -> None:
        """A step's tokens were read. A step that failed is never read: its duration stays None."""
        for step in reversed(self._steps):  # it is the last or the one before
            if step.step_id == step_id:
                step.duration_s = now - step.time
                return

    def close(self, request: Request, now: float) -> None:
        """A request ended."""
        events = self._live.pop(request.request_id)
        record = _describe(request.request_id, events.sequences, now)
        events.sequences = ()  # prompts, outputs and logprobs are not kept
        self._ended.pop(request.request_id, None)  # an older one of the same id
        self._ended[request.request_id] = (record, events)
        if len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]

    def recent_steps(self, since: int) -> list[StepEvent]:
        """The engine's steps with `step_id >= since`, oldest first."""
        return [
            StepEvent(s.step_id, s.time, s.duration_s, s.num_tokens, s.num_seqs, s.num_prompt_tokens, s.padded_tokens)
            for s in self._steps
            if s.step_id >= since
        ]

    def of(self, request_id: str) -> RequestTimeline | None:
        """What happened to a request; None if it is not known (any more)."""
        events = self._live.get(request_id)
        if events is not None:
            return replace(_describe(request_id, events.sequences, None), events=events.of_steps())
        if request_id in self._ended:
            record, events = self._ended[request_id]
            return replace(record, events=events.of_steps())
        return None


def _describe(request_id: str, sequences: tuple[Sequence, ...], ended: float | None) -> RequestTimeline:
    """The state of a request, without its events."""
    request = sequences[0].request
    reasons = [str(s.finish_reason) for s in sequences if s.finish_reason is not None]
    return RequestTimeline(
        request_id=request_id,
        status=_status(sequences).value,
        arrival_time=request.arrival_time,
        scheduled_ts=min((s.scheduled_ts for s in sequences if s.scheduled_ts is not None), default=None),
        first_token_ts=min((s.first_token_ts for s in sequences if s.first_token_ts is not None), default=None),
        finished_ts=ended,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=sequences[0].num_cached_tokens,
        num_output_tokens=sum(len(s.output_token_ids) for s in sequences),
        num_preemptions=sum(s.num_preemptions for s in sequences),
        finish_reason=reasons[-1] if len(reasons) == len(sequences) else None,
        num_draft_tokens=sum(s.num_drafted for s in sequences),
        num_accepted_tokens=sum(s.num_accepted for s in sequences),
    )


def _status(sequences: Several[Sequence]) -> SequenceStatus:
    """Of n completions: running if one runs, else what the first unfinished one is."""
    unfinished = [s.status for s in sequences if not s.finished]
    if not unfinished:
        return SequenceStatus.FINISHED
    return SequenceStatus.RUNNING if SequenceStatus.RUNNING in unfinished else unfinished[0]
