"""Body of `/requests/{request_id}/timeline`. Times are seconds since the request arrived."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict

from engine.client import RequestTimeline, StepEvent


class TimelineStep(BaseModel):
    """One step that the request was in: when it was dispatched, how long until its tokens were read (null while it
    runs), tokens of this request in it, and how many of those were of the prompt; rows of the step, padding included.
    """

    model_config = ConfigDict(extra="forbid")

    step_id: int
    time_s: float
    duration_s: float | None
    num_tokens: int
    num_prompt_tokens: int
    num_seqs: int
    padded_tokens: int

    @classmethod
    def of(cls, event: StepEvent, arrival: float) -> Self:
        """From the engine's."""
        return cls(
            step_id=event.step_id,
            time_s=event.time - arrival,
            duration_s=event.duration_s,
            num_tokens=event.num_tokens,
            num_prompt_tokens=event.num_prompt_tokens,
            num_seqs=event.num_seqs,
            padded_tokens=event.padded_tokens,
        )


class Timeline(BaseModel):
    """What happened to a request; a time is null where it has not happened yet. `steps` are the newest some hundred.
    Draft tokens are guesses of speculative decoding that were verified, accepted ones those that were right.
    """

    model_config = ConfigDict(extra="forbid")

    request_id: str
    status: str
    queued_s: float | None
    first_token_s: float | None
    finished_s: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int
    finish_reason: str | None
    steps: list[TimelineStep]

    @classmethod
    def of(cls, timeline: RequestTimeline) -> Self:
        """From the engine's."""
        arrival = timeline.arrival_time

        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - arrival

        return cls(
            request_id=timeline.request_id,
            status=timeline.status,
            queued_s=since(timeline.scheduled_ts),
            first_token_s=since(timeline.first_token_ts),
            finished_s=since(timeline.finished_ts),
            num_prompt_tokens=timeline.num_prompt_tokens,
            num_cached_tokens=timeline.num_cached_tokens,
            num_output_tokens=timeline.num_output_tokens,
            num_preemptions=timeline.num_preemptions,
            num_draft_tokens=timeline.num_draft_tokens,
            num_accepted_tokens=timeline.num_accepted_tokens,
            finish_reason=timeline.finish_reason,
            steps=[TimelineStep.of(event, arrival) for event in timeline.events],
        )
