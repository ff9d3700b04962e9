"""The pace of prompts beside streams: it learns, keeps its target, climbs, forgets, and starves nobody. No device."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.pace import LEAST_CHUNK, NO_LIMIT, PromptPace
from engine.scheduling.scheduler import Scheduler
from tests.scheduling.toy import make_limits, make_sequences

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
Device = Callable[[int], float]


def affine(size: int) -> float:
    """Seconds of a step: 20 ms, and 0.5 ms per token."""
    return 0.020 + 0.0005 * size


def bucket(num_tokens: int) -> int:
    return min(size for size in SIZES if size >= num_tokens)


def serve(pace: PromptPace, device: Device, num_streams: int, num_steps: int) -> list[int]:
    """Shapes of steps in which an endless prompt is read beside streams."""
    shapes = []
    for _ in range(num_steps):
        shapes.append(bucket(num_streams + pace.prompt_tokens(num_streams)))
        pace.observe(shapes[-1], device(shapes[-1]))
    return shapes


def test_nothing_known_gives_the_smallest_shape_with_a_chunk() -> None:
    pace = PromptPace(0.1, SIZES)
    for streams in (1, 15, 16, 17, 100):
        given = pace.prompt_tokens(streams)
        assert given >= LEAST_CHUNK and streams + given == bucket(streams + LEAST_CHUNK)
    assert pace.prompt_tokens(0) == NO_LIMIT


def test_climbs_to_the_largest_shape_that_keeps_the_target() -> None:
    pace = PromptPace(0.1, SIZES)
    shapes = serve(pace, affine, 16, 20)
    assert shapes[0] == 32 and shapes[-1] == 128  # affine(128) is 84 ms, affine(256) 148
    assert shapes == sorted(shapes) and max(map(affine, shapes)) <= 0.1


def test_a_step_that_is_slower_than_promised_is_left_at_once() -> None:
    def cliff(size: int) -> float:
        return 0.02 if size <= 64 else 0.3

    shapes = serve(PromptPace(0.1, SIZES), cliff, 16, 100)
    assert shapes.count(128) == 1 and set(shapes[4:]) == {64}


def test_times_are_monotone_and_a_pause_is_not_believed() -> None:
    pace = PromptPace(0.1, SIZES)
    for size in (32, 64, 128):
        pace.observe(size, affine(size))
    pace.observe(64, 50.0)
    assert affine(64) < (pace.seconds(64) or 0) <= 3 * affine(64)
    expected = [pace.seconds(size) or 0.0 for size in SIZES]
    assert expected == sorted(expected)


def test_what_was_slow_is_tried_again() -> None:
    pace = PromptPace(0.1, SIZES)
    assert serve(pace, lambda size: 4 * affine(size), 16, 200)[-1] == 32  # no shape keeps it: the least chunk goes on
    assert serve(pace, affine, 16, 2000)[-1] == 128


def test_a_prompt_never_starves_where_no_shape_is_larger_than_the_streams() -> None:
    assert PromptPace(0.1, [1, 2, 4]).prompt_tokens(4) == LEAST_CHUNK


def test_the_scheduler_holds_prompts_back_only_beside_streams() -> None:
    limits = make_limits(max_num_seqs=4, max_num_batched_tokens=512, max_model_len=2048, block_size=16)
    pace = PromptPace(0.1, SIZES)
    scheduler = Scheduler(limits, BlockPool(600), pace)
    scheduler.add(make_sequences("first", range(2, 302), max_tokens=200))
    plan = scheduler.plan()
    assert plan is not None and plan.num_tokens == 300  # nobody streams yet
    scheduler.commit(plan, [[7]])
    scheduler.add(make_sequences("long", [3] * 1500, max_tokens=5))
    scheduler.add(make_sequences("late", [4] * 100, max_tokens=5))
    lengths, prompt = [], 0
    while prompt < 1600:
        plan = scheduler.plan()
        assert plan is not None and plan.items[0].sequence.request.request_id == "first"  # the stream is in every step
        assert plan.items[0].num_tokens == 1
        lengths.append(plan.num_tokens)
        prompt += sum(item.num_tokens for item in plan.items if item.num_tokens > 1)
        pace.observe(bucket(plan.num_tokens), affine(bucket(plan.num_tokens)))
        scheduler.commit(plan, [[7]] * len(plan.items))
        scheduler.check_invariants()
    assert lengths[0] == 32 and max(lengths) == 128 and len(lengths) < 40
    assert max(affine(bucket(length)) for length in lengths) <= 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"itl_target_ms": 0.0}, "itl_target_ms must be a positive number, got 0.0"),
        ({"itl_target_ms": float("nan")}, "itl_target_ms must be a positive number"),
        ({"itl_target_ms": 50, "enable_chunked_prefill": False}, "enable_chunked_prefill=False forbids"),
        ({"itl_target_ms": "50"}, "itl_target_ms must be a number or None"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_flat(**settings)
