"""Timelines: what they show agrees with what was computed, and they stay small."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from engine import timeline as timelines
from engine.core import CoreOptions, EngineCore
from engine.engine import Engine
from engine.output_processor import OutputProcessor
from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.plan import ScheduledSequence, StepPlan
from engine.scheduling.scheduler import Scheduler
from engine.timeline import Timeline
from tests.engine.helpers import core_of, drive, inputs_of, parts_of, random_ids

FINAL = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)


def request_of(request_id: str, length: int = 8) -> Request:
    return Request(request_id, None, (5,) * length, FINAL, (), (), 0, 0, None, time.monotonic())


def plan_of(step_id: int, sequences: list[Sequence], start: int, num_tokens: int) -> StepPlan:
    return StepPlan(step_id, tuple(ScheduledSequence(s, 0, start, num_tokens, True, 0, False) for s in sequences))


def test_chunks_of_a_prompt_and_tokens(engine: Engine) -> None:
    """A prompt of 100 tokens in steps of at most 64, then six tokens: the last is never computed."""
    core = core_of(engine)
    prompt = random_ids(np.random.default_rng(1), 100)
    before = time.monotonic()
    drive(core, [(0, inputs_of(engine).make(prompt, FINAL, request_id="timed"))])
    known = core.timeline.of("timed")
    assert known is not None and known.status == "finished" and known.finish_reason == "length"
    assert [(e.num_tokens, e.num_prompt_tokens) for e in known.events] == [(64, 64), (36, 36), *[(1, 0)] * 5]
    assert all(e.padded_tokens >= e.num_tokens and e.num_seqs == 1 for e in known.events)
    assert known.scheduled_ts is not None and known.first_token_ts is not None and known.finished_ts is not None
    assert before <= known.arrival_time <= known.scheduled_ts <= known.first_token_ts <= known.finished_ts
    assert all(e.duration_s is not None and e.duration_s > 0 for e in known.events)
    steps = core.timeline.recent_steps(known.events[0].step_id)
    assert [s.step_id for s in steps] == [e.step_id for e in known.events]
    assert core.timeline.recent_steps(steps[-1].step_id + 1) == []
    assert (known.num_prompt_tokens, known.num_output_tokens, known.num_preemptions) == (100, 6, 0)
    # A second time it comes out of the prefix cache.
    drive(core, [(0, inputs_of(engine).make(prompt, FINAL, request_id="cached"))])
    cached = core.timeline.of("cached")
    assert cached is not None and cached.num_cached_tokens == 96 and cached.events[0].num_prompt_tokens == 4


def test_live_requests(engine: Engine) -> None:
    core = core_of(engine)
    core.add(inputs_of(engine).make([5, 6], FINAL, request_id="live"))
    waiting = core.timeline.of("live")
    core.step()
    running = core.timeline.of("live")
    core.abort("live")
    while core.has_work:
        core.step()
    ended = core.timeline.of("live")
    assert waiting is not None and running is not None and ended is not None
    assert (waiting.status, waiting.events, waiting.scheduled_ts) == ("waiting", (), None)
    assert running.status == "running" and len(running.events) == 1 and running.events[0].duration_s is None
    assert (ended.status, ended.finish_reason) == ("finished", "abort")
    assert core.timeline.of("nobody") is None


def test_preemptions_show(engine: Engine) -> None:
    """Four sequences that grow beyond what the pool holds."""
    parts = parts_of(engine)
    limits = replace(parts.core.scheduler._limits, max_model_len=120)
    scheduler = Scheduler(limits, BlockPool(16))
    core = EngineCore(scheduler, parts.core.executor, OutputProcessor(parts.tokenizer), CoreOptions(overlap=True))
    params = FINAL.replace(max_tokens=60)
    drive(core, [(0, inputs_of(engine).make([7 + i] * 30, params, request_id=f"p{i}")) for i in range(4)])
    records = [core.timeline.of(f"p{i}") for i in range(4)]
    assert sum(r.num_preemptions for r in records if r) == core.scheduler.stats().num_preemptions > 0
    for record in records:
        assert record is not None
        computed = sum(e.num_tokens for e in record.events)
        assert computed == 30 + 59 if record.num_preemptions == 0 else computed > 30 + 59


def test_n_completions_are_one_event_per_step() -> None:
    timeline, request = Timeline(), request_of("n")
    sequences = [Sequence(request, i) for i in range(3)]
    timeline.open(request, sequences)
    timeline.on_dispatch(plan_of(0, sequences, 4, 6), 1.0, 32)
    timeline.on_collected(0, 1.5)
    known = timeline.of("n")
    assert known is not None
    [event] = known.events
    assert (event.num_tokens, event.num_prompt_tokens, event.num_seqs) == (18, 12, 3)
    assert (event.duration_s, event.padded_tokens) == (0.5, 32)


def test_rings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "MOST_ENDED", 10)
    timeline = Timeline()
    for i in range(30):
        request = request_of(f"r{i}")
        timeline.open(request, [Sequence(request)])
        timeline.close(request, 2.0)
    assert timeline.of("r19") is None and timeline.of("r20") is not None and len(timeline._ended) == 10
    request = request_of("long")
    sequence = Sequence(request)
    timeline.open(request, [sequence])
    for step in range(3000):
        timeline.on_dispatch(plan_of(step, [sequence], step, 1), float(step), 1)
    known = timeline.of("long")
    assert known is not None and [e.step_id for e in known.events] == list(range(3000 - 256, 3000))
    assert [s.step_id for s in timeline.recent_steps(0)] == list(range(3000 - 1024, 3000))


def test_an_id_that_comes_again() -> None:
    timeline = Timeline()
    for count in (1, 2):
        request = request_of("same", count)
        timeline.open(request, [Sequence(request)])
        timeline.close(request, 2.0)
    known = timeline.of("same")
    assert known is not None and known.num_prompt_tokens == 2 and len(timeline._ended) == 1


@pytest.mark.slow
def test_the_hot_path_is_cheap() -> None:
    """Less than 2 µs per sequence and step, on a machine that may be busy: the best of many."""
    timeline = Timeline()
    sequences = [Sequence(request_of(f"r{i}")) for i in range(256)]
    for sequence in sequences:
        timeline.open(sequence.request, [sequence])
    plans = [plan_of(step, sequences, 100 + step, 1) for step in range(300)]
    best = 1.0
    for plan in plans:
        started = time.perf_counter()
        timeline.on_dispatch(plan, 0.0, 256)
        timeline.on_collected(plan.step_id, 1.0)
        best = min(best, time.perf_counter() - started)
    assert best / 256 < 2e-6, f"{best / 256 * 1e6:.2f} µs"
