"""Does again what a recording says, and compares: the facade of `quire replay`."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.builder import build_engine
from engine.built import BuiltEngine
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.remote.plain import from_plain
from engine.replay.events import (
    Collect,
    Event,
    Failed,
    Forward,
    Item,
    NewSequence,
    Reset,
    Sample,
    count_events,
    read_recording,
)
from engine.replay.recorder import digests, sampled_tokens
from engine.replay.report import Difference, ReplayReport
from engine.requests.request import Request
from engine.requests.sequence import Sequence
from engine.runtime.buckets import Bucket
from engine.runtime.executor import InFlightStep, StartedStep, StepResult
from engine.runtime.progress import progress_bar
from engine.scheduling.plan import ScheduledSequence, StepPlan


def replay(path: Path, changes: Mapping[str, Any]) -> ReplayReport:
    """Run all steps of a recording, up to the first difference.

    Args:
        path: of the recording.
        changes: settings to run with instead of the recorded ones: other kernels, another dtype. What shapes the steps
            (sequences, tokens, blocks) stays.

    Raises:
        ConfigError: the file is no recording, or its steps do not fit the engine that the settings make.
        QuireError: as `build_engine`.
    """
    header, events = read_recording(path)
    config = EngineConfig.from_flat(**{**header.settings, **changes})
    built = build_engine(config)
    player, num_events = _Player(built), count_events(path)
    started, num_tokens, num_steps, difference = time.perf_counter(), 0, 0, None
    with progress_bar("replaying", show=config.compile.show_progress) as report:
        for done, event in enumerate(events, 1):
            try:
                difference = player.play(event)
            except (KeyError, IndexError) as error:
                kind = type(event).__name__
                raise ConfigError(f"{path} is damaged: {kind} of something unknown ({error}).") from error
            if isinstance(event, Collect):
                num_steps, num_tokens = num_steps + 1, num_tokens + sum(map(len, event.tokens))
            report(done, num_events, f"{num_steps} steps")
            if difference is not None:
                break
    seconds, device = time.perf_counter() - started, built.describe()["device"]
    return ReplayReport(str(path), header.device, device, num_steps, num_tokens, seconds, difference)


class _Player:
    """What a recording has come to."""

    def __init__(self, built: BuiltEngine) -> None:
        self._executor = built.core.executor
        self._sequences: dict[int, Sequence] = {}
        self._started: dict[int, StartedStep] = {}
        self._in_flight: dict[int, InFlightStep] = {}
        self._failure: tuple[int, str, Exception] | None = None  # (step, stage, what was raised) not recorded yet

    def play(self, event: Event) -> Difference | None:
        """Do what one line says.

        Raises:
            KeyError, IndexError: it speaks of what no line before it has named.
        """
        if self._failure is not None and not isinstance(event, Failed):
            step, stage, error = self._failure
            return Difference(step, stage, "", f"the step raised {error!r}", "it did not")
        match event:
            case NewSequence():
                self._sequences[event.number] = _sequence(event)
            case Forward():
                self._forward(event)
            case Sample():
                self._sample(event)
            case Collect():
                return self._collect(event)
            case Failed():
                return self._fail(event)
            case Reset():
                self._started.clear()
                self._in_flight.clear()
                self._executor.reset_state()
        return None

    def _forward(self, event: Forward) -> None:
        plan = StepPlan(event.step, tuple(self._item(item) for item in event.items))
        try:
            bucket = Bucket(*event.bucket) if event.bucket else None
            self._started[event.step] = self._executor.forward(plan, bucket)
        except Exception as error:
            self._failure = event.step, "forward", error

    def _item(self, item: Item) -> ScheduledSequence:
        """A part of a plan; brings its sequence to where it stood."""
        sequence = self._sequences[item.number]
        sequence.output_token_ids += item.outputs
        sequence.block_table[item.first_new_block :] = item.blocks
        sequence.num_preemptions = item.num_preemptions
        return ScheduledSequence(
            sequence,
            item.row,
            item.start,
            item.num_tokens,
            item.samples,
            item.first_new_block,
            item.starts_row,
            item.drafts,
            item.is_relative,
        )

    def _sample(self, event: Sample) -> None:
        mask = None
        if event.mask is not None:
            mask = np.frombuffer(zlib.decompress(event.mask), np.int32).reshape(event.shape)
        try:
            self._in_flight[event.step] = self._executor.sample(self._started.pop(event.step), mask)
        except Exception as error:
            self._failure = event.step, "sample", error

    def _collect(self, event: Collect) -> Difference | None:
        try:
            result = self._executor.collect(self._in_flight.pop(event.step))
        except Exception as error:
            return Difference(event.step, "collect", "", f"the step raised {error!r}", "it did not")
        return next(_differences(event, result), None)

    def _fail(self, event: Failed) -> Difference | None:
        """A step that failed when it was recorded must fail again."""
        if event.stage == "collect":
            try:
                self._executor.collect(self._in_flight.pop(event.step))
            except Exception:
                return None
        elif self._failure is not None and self._failure[:2] == (event.step, event.stage):
            self._failure = None
            return None
        return Difference(event.step, event.stage, "", "the step succeeded", f"it raised {event.error}")


def _sequence(event: NewSequence) -> Sequence:
    sequence = Sequence(from_plain(Request, event.request), event.index)
    if event.index == 0 and sequence.request.params.prompt_logprobs is not None:
        sequence.prompt_logprobs = [None]
    return sequence


def _differences(event: Collect, result: StepResult) -> Iterator[Difference]:
    for item, recorded, found in zip(result.plan.items, event.tokens, sampled_tokens(result), strict=True):
        if recorded != found:
            sequence = item.sequence
            where = f"{sequence.request.request_id}[{sequence.index}], position {item.start + item.num_tokens}"
            yield Difference(event.step, "tokens", where, str(found), str(recorded))
    found_digests = digests(result)
    for name, recorded in event.digests.items():
        found = found_digests.get(name, "none")
        if found != recorded:
            yield Difference(event.step, name, "", f"bits with digest {found}", f"digest {recorded}")
