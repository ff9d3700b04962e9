"""Drafts that the device makes itself never change the answer: each method, under every schedule and parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings

from engine.built import BuiltEngine
from engine.outputs import RequestOutput
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import parts_of
from tests.engine.speculation import (
    CASES,
    EXECUTABLES,
    METHODS,
    Arrival,
    config_of,
    each_alone,
    guessing,
    require_same_as_alone,
    schedules,
    seeds,
    shares,
    workloads,
)
from tests.engine.test_invariance import Schedule, require_same, run

FAST = "same_model"
ALL = [Arrival(number) for number in range(len(CASES))]


@pytest.fixture(
    scope="module", params=[name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def parts(shelf: EngineShelf, method: str, head_dir: Path) -> BuiltEngine:
    return parts_of(shelf.take(**EXECUTABLES, speculative_config=config_of(method, head_dir)))


@pytest.fixture(scope="module")
def alone(shelf: EngineShelf) -> list[RequestOutput]:
    """What each case gives by itself in an engine that does not speculate."""
    return each_alone(parts_of(shelf.take(**EXECUTABLES)))


def test_every_parameter(parts: BuiltEngine, alone: list[RequestOutput], method: str) -> None:
    """With room for all, so that nearly every step drafts: penalties, stop strings, logprobs, grammars."""
    core = guessing(parts, Schedule(spare_blocks=200), 1.0, 0)
    require_same_as_alone(core, parts, ALL, alone)
    stats = core.stats
    assert stats.num_draft_tokens > 100
    assert sum(stats.accepted_at) == stats.num_accepted_tokens
    if method == "same_model":
        # Penalties, bans and grammars are not drafted with, so not all are right.
        assert stats.num_accepted_tokens > 0.4 * stats.num_draft_tokens


def test_a_model_foresees_itself(shelf: EngineShelf, alone: list[RequestOutput], head_dir: Path) -> None:
    """Without penalties and bans all its guesses are right, greedy and at random: nothing of its cache is lost."""
    parts = parts_of(shelf.take(**EXECUTABLES, speculative_config=config_of("same_model", head_dir)))
    plain = [0, 1, 2, 3, 9, 11, 13, 14]
    core = guessing(parts, Schedule(spare_blocks=200), 0.7, 1)
    for output, number in zip(run(core, parts, plain, [0, 2] * 4), plain, strict=True):
        require_same(output, alone[number])
    assert core.stats.num_accepted_tokens > 0.97 * core.stats.num_draft_tokens > 30


@settings(max_examples=40, derandomize=True, deadline=None)
@given(schedule=schedules, workload=workloads, share=shares, seed=seeds)
def test_any_schedule(
    schedule: Schedule,
    workload: list[Arrival],
    share: float,
    seed: int,
    parts: BuiltEngine,
    alone: list[RequestOutput],
) -> None:
    """Whatever the order, the chunks, the preemptions and the aborts."""
    require_same_as_alone(guessing(parts, schedule, share, seed), parts, workload, alone)


def test_preempted_again_and_again(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    num_drafts = 0
    for spare_blocks in (0, 2):
        core = guessing(parts, Schedule(spare_blocks=spare_blocks), 0.9, 3)
        require_same_as_alone(core, parts, ALL, alone)
        assert core.scheduler.stats().num_preemptions > 0
        num_drafts += core.stats.num_draft_tokens
    assert num_drafts > 20


def test_state_made_anew_forgets_what_was_drafted(parts: BuiltEngine, alone: list[RequestOutput]) -> None:
    """As after a failed step; the drafter's too, and later requests get their tokens."""
    core = guessing(parts, Schedule(spare_blocks=200), 1.0, 0)
    core.executor.reset_state()
    require_same_as_alone(core, parts, [Arrival(1), Arrival(14), Arrival(len(CASES) - 4)], alone)


INT8 = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "block_size": 8, "max_logprobs": -1, "kv_cache_dtype": "int8"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer_skip", "same_model", "eagle", "eagle3"])  # Medusa has no keys and values
def test_int8_keys_and_values(name: str, shelf: EngineShelf, head_dir: Path) -> None:
    """Pages that drafts are written to hold one scale for each token: what is written again is exact again."""
    some = [Arrival(number) for number in (0, 2, 4, 9, 12, 13, 14, 17, 18, len(CASES) - 5, len(CASES) - 4)]
    alone = each_alone(parts_of(shelf.take(**INT8)))
    parts = parts_of(shelf.take(**INT8, speculative_config=config_of(name, head_dir)))
    for spare_blocks in (200, 0):
        core = guessing(parts, Schedule(max_num_seqs=2, spare_blocks=spare_blocks), 0.8, 2)
        require_same_as_alone(core, parts, some, alone)
        assert core.stats.num_draft_tokens > 50
