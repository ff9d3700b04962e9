"""Body of `/engine/steps`: what the engine does now, for people who watch it."""

from __future__ import annotations

from serving.protocol.base import ResponseBody


class EngineStep(ResponseBody):
    """One step. Fields as in `engine.client.StepEvent`; `time` is on the clock of `EngineSteps.now`, in seconds."""

    step_id: int
    time: float
    duration_s: float | None
    num_tokens: int
    num_seqs: int
    num_prompt_tokens: int
    padded_tokens: int


class EngineSteps(ResponseBody):
    """Gauges of this moment, and the steps that were asked for.

    `reset` is true if the steps are all that there are, because the engine started anew since the last question.
    `next_since` is what to ask with next: the first step that still runs, or the one after the newest. Rates are null
    while there is nothing to divide by.
    """

    now: float
    model: str
    device: str | None
    dtype: str | None
    max_model_len: int
    max_num_seqs: int
    num_kv_blocks: int
    block_size: int
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_preemptions: int
    prefix_hit_rate: float | None
    compiles_after_ready: int
    reset: bool
    next_since: int
    steps: list[EngineStep]
