"""Speculative decoding never changes the answer: with guesses right, wrong and mixed, whatever else happens."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.built import BuiltEngine
from engine.core import CoreOptions, EngineCore
from engine.engine import Engine
from engine.output_processor import OutputProcessor
from engine.outputs import RequestOutput
from engine.requests.sequence import Sequence as EngineSequence
from engine.runtime.speculation import make_proposer
from engine.sampling_params import SamplingParams, StructuredOutputsParams
from engine.scheduling.scheduler import Scheduler
from engine.speculative.settings import SpeculativeSettings
from engine.speculative.speculator import Speculator
from engine.speculative.suffix import SuffixOptions, SuffixProposer
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import GOLDEN_SETTINGS, TINY, core_of, golden_prompts, parts_of, tokens_of
from tests.engine.speculation import CASES as ALL_CASES
from tests.engine.speculation import (
    EXECUTABLES,
    NUM_DRAFTS,
    Arrival,
    each_alone,
    require_same_as_alone,
    schedules,
    seeds,
    shares,
    sometimes,
    workloads,
)
from tests.engine.test_invariance import CASES, Schedule, make_core, require_same, run

ALL = [Arrival(number) for number in range(len(ALL_CASES))]
CONFIG = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "adaptive": False}


HOST = {
    "ngram": SpeculativeSettings(method="ngram", num_speculative_tokens=NUM_DRAFTS, prompt_lookup_min=1),
    "suffix": SpeculativeSettings(
        method="suffix", num_speculative_tokens=NUM_DRAFTS, suffix_decoding_max_spec_factor=3.0
    ),
}


class Oracle:
    """A proposer that knows the answers, and lies at times."""

    def __init__(self, answers: dict[tuple[int, int], Sequence[int]], lies: float, seed: int) -> None:
        self.answers, self.lies, self.rng = answers, lies, np.random.default_rng(seed)

    def extend(self, sequence: EngineSequence) -> None:
        """It knows already."""

    def propose(self, sequence: EngineSequence) -> tuple[int, ...]:
        answer = self.answers[sequence.request.params.seed or 0, sequence.index]
        start = len(sequence.output_token_ids)
        drafts = list(answer[start : start + int(self.rng.integers(0, NUM_DRAFTS + 1))])
        if drafts and self.rng.random() < self.lies:
            drafts[int(self.rng.integers(len(drafts)))] = int(self.rng.integers(3, 300))
        return tuple(drafts)

    def forget(self, sequence: EngineSequence) -> None:
        """Nothing is kept."""


@pytest.fixture(scope="module")
def parts(shelf: EngineShelf) -> BuiltEngine:
    return parts_of(shelf.take(**EXECUTABLES, speculative_config=json.dumps(CONFIG)))


@pytest.fixture(scope="module")
def alone(shelf: EngineShelf) -> list[RequestOutput]:
    """What each case gives by itself in an engine that does not speculate."""
    return each_alone(parts_of(shelf.take(**EXECUTABLES)))


def speculating(
    parts: BuiltEngine, schedule: Schedule, alone: list[RequestOutput], lies: float, share: float, seed: int
) -> EngineCore:
    """As `make_core`, with an oracle."""
    answers = {
        (case.params.seed or 0, completion.index): completion.token_ids
        for case, output in zip(ALL_CASES, alone, strict=True)
        for completion in output.outputs
    }
    core = make_core(parts, schedule)
    core._speculator = sometimes(Speculator(Oracle(answers, lies, seed), None), share, seed)
    return core


def test_every_parameter_with_right_guesses(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    """Penalties, bad words, min_tokens, stop strings and log-probabilities as without."""
    core = speculating(parts, Schedule(spare_blocks=200), alone, lies=0.0, share=1.0, seed=0)
    outputs = run(core, parts, range(len(CASES)), [0] * len(CASES))
    for output, expected in zip(outputs, alone[: len(CASES)], strict=True):
        require_same(output, expected)
    stats = core.stats
    assert stats.num_draft_tokens > 100
    assert stats.num_accepted_tokens > 0.9 * stats.num_draft_tokens, "right guesses are accepted"
    assert sum(stats.accepted_at) == stats.num_accepted_tokens
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    assert len(metrics) == len(outputs)
    assert sum(m.num_accepted_tokens for m in metrics) == sum(sum(m.accepted_per_pos) for m in metrics)
    known = core.timeline.of("0")
    assert known is not None and known.num_draft_tokens == metrics[0].num_draft_tokens > 0
    assert known.num_accepted_tokens == metrics[0].num_accepted_tokens
    # What was in flight when a sequence ended is only in the engine's counts.
    assert 0.8 * stats.num_drafts < sum(m.num_drafts for m in metrics) <= stats.num_drafts
    assert 0.8 * stats.num_draft_tokens < sum(m.num_draft_tokens for m in metrics) <= stats.num_draft_tokens
    assert all(m.num_drafts <= m.num_draft_tokens <= NUM_DRAFTS * m.num_drafts for m in metrics)
    assert stats.num_steps < sum(len(c.token_ids) for o in alone[: len(CASES)] for c in o.outputs)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(schedule=schedules, workload=workloads, lies=st.sampled_from([0.0, 0.3, 1.0]), share=shares, seed=seeds)
def test_any_schedule_with_any_guesses(
    schedule: Schedule,
    workload: list[Arrival],
    lies: float,
    share: float,
    seed: int,
    parts: BuiltEngine,
    alone: list[RequestOutput],
) -> None:
    require_same_as_alone(speculating(parts, schedule, alone, lies, share, seed), parts, workload, alone)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(schedule=schedules, workload=workloads, share=shares, seed=seeds)
@pytest.mark.parametrize("name", HOST)
def test_any_schedule_with_each_proposer(
    schedule: Schedule,
    workload: list[Arrival],
    share: float,
    seed: int,
    name: str,
    parts: BuiltEngine,
    alone: list[RequestOutput],
) -> None:
    """As they are: from single tokens, so that there are guesses, mostly wrong ones."""
    core = make_core(parts, schedule)
    core._speculator = sometimes(Speculator(make_proposer(HOST[name]), None), share, seed)
    require_same_as_alone(core, parts, workload, alone)


def test_suffixes_of_past_outputs(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    """What a request gave is guessed when it comes again, and is not changed by that."""
    options = SuffixOptions(num_drafts=NUM_DRAFTS, max_depth=24, spec_factor=1.0, least_prob=0.1, most_outputs=100)
    core = make_core(parts, Schedule(spare_blocks=200))
    core._speculator = Speculator(SuffixProposer(options), None)
    rates = []
    for _ in range(2):
        before = core.stats.num_draft_tokens, core.stats.num_accepted_tokens
        for output, expected in zip(
            run(core, parts, range(len(CASES)), [0] * len(CASES)), alone[: len(CASES)], strict=True
        ):
            require_same(output, expected)
        drafted, right = core.stats.num_draft_tokens - before[0], core.stats.num_accepted_tokens - before[1]
        rates.append(right / max(drafted, 1))
    assert rates[1] > max(0.7, rates[0])


class Slow(Oracle):
    """Thinks for long."""

    def propose(self, sequence: EngineSequence) -> tuple[int, ...]:
        time.sleep(0.01)
        return super().propose(sequence)


def test_the_time_for_guesses_is_time_of_the_step(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    """While the host guesses the device has nothing to do: what drafts gain must pay for that, too."""
    core = speculating(parts, Schedule(spare_blocks=200), alone, lies=0.0, share=1.0, seed=0)
    speculator = core._speculator
    assert speculator is not None
    speculator._proposer = Slow(speculator._proposer.answers, 0.0, 0)  # type: ignore[attr-defined]
    seen: list[float] = []

    def observe_time(num_tokens: int, num_seqs: int, seconds: float, num_drafts: int) -> None:
        if num_drafts:
            seen.append(seconds)

    speculator.observe_time = observe_time  # type: ignore[method-assign]
    run(core, parts, [0], [0])
    assert len(seen) > 3 and min(seen) > 0.01


def test_preempted_again_and_again(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    core = speculating(parts, Schedule(spare_blocks=0), alone, lies=0.2, share=0.7, seed=3)
    require_same_as_alone(core, parts, ALL, alone)
    assert core.scheduler.stats().num_preemptions > 0


def test_a_planted_fault_is_seen(
    parts: BuiltEngine, alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test can fail: a host that believes one draft more than was right gives other tokens."""
    core = speculating(parts, Schedule(spare_blocks=200), alone, lies=1.0, share=1.0, seed=5)
    collect = core.executor.collect

    def believe(step: Any) -> Any:
        result = collect(step)
        for item, tokens in zip(result.plan.items, result.tokens, strict=True):
            if len(tokens) <= len(item.drafts):
                tokens.insert(len(tokens) - 1, item.drafts[len(tokens) - 1])
        return result

    monkeypatch.setattr(core.executor, "collect", believe)
    outputs = run(core, parts, range(4), [0] * 4)
    assert any(tokens_of(output) != tokens_of(expected) for output, expected in zip(outputs, alone[:4], strict=True))


def test_greedy_text_that_repeats_itself(shelf: EngineShelf) -> None:
    """By `Engine.generate`: prompts are guessed from (by single tokens, mostly wrongly), and golden tokens come out."""
    engine = shelf.take(**GOLDEN_SETTINGS, speculative_config=json.dumps({**CONFIG, "prompt_lookup_min": 1}))
    golden = golden_prompts(TINY / "llama")
    length = len(golden[0].continuation)
    outputs = engine.generate(
        [g.prompt for g in golden], SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    )
    for output, expected in zip(outputs, golden, strict=True):
        assert list(output.outputs[0].token_ids) == expected.continuation
    repeated = [*golden[0].prompt, *golden[0].continuation] * 2
    (output,) = engine.generate([repeated[-60:]], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    stats = core_of(engine).stats
    assert stats.num_draft_tokens > 0
    plain = shelf.take(**GOLDEN_SETTINGS)
    (expected,) = plain.generate([repeated[-60:]], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    assert tokens_of(output) == tokens_of(expected)


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutputsParams(regex="(ab|cd){2,6}"),
        StructuredOutputsParams(json='{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
    ],
)
def test_grammars(structured: StructuredOutputsParams, shelf: EngineShelf) -> None:
    """Masks after each draft; guesses that break the grammar among them."""
    params = [
        SamplingParams(temperature=t, max_tokens=30, seed=seed, structured_outputs=structured, min_tokens=m)
        for seed, (t, m) in enumerate([(0.0, 0), (0.0, 0), (1.0, 0), (1.0, 0)])
    ]
    prompts = ["abab", "cdcdcd {", "ab cd ab cd", '{"a": 1}']
    plain = shelf.take(**EXECUTABLES).generate(prompts, params)
    engine: Engine = shelf.take(**EXECUTABLES, speculative_config=json.dumps(CONFIG))
    built = parts_of(engine)
    answers = {(seed, 0): output.outputs[0].token_ids for seed, output in enumerate(plain)}
    limits, pool = built.core.scheduler._limits, built.core.scheduler._allocator.pool
    core = EngineCore(
        Scheduler(limits, pool),
        built.core.executor,
        OutputProcessor(built.tokenizer),
        CoreOptions(overlap=True),
        built.core.grammars,
        sometimes(Speculator(Oracle(answers, 0.3, 1), None), 0.8, 1),
    )
    for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        core.add(built.inputs.make(prompt, each, request_id=f"g{index}"))
    found: dict[str, RequestOutput] = {}
    while core.has_work:
        for output in core.step():
            found[output.request_id] = output
    for index, expected in enumerate(plain):
        assert found[f"g{index}"].outputs[0].text == expected.outputs[0].text
        assert found[f"g{index}"].outputs[0].finish_reason == expected.outputs[0].finish_reason
    assert core.stats.num_accepted_tokens > 0
