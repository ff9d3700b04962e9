"""Are the proofs able to see faults with drafts? Each test breaks one thing that only drafts need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.requests.sequence import Sequence, SequenceStatus
from engine.scheduling import scheduler
from engine.scheduling.allocator import KVAllocator
from engine.scheduling.plan import ScheduledSequence
from engine.scheduling.scheduler import Scheduler
from tests.scheduling.toy import ToyEngine, make_limits, run_random

Patch = Callable[[object, str, object], None]


def count_one_more_accepted_than_verified(patch: Patch) -> None:
    settle = scheduler.settle_drafts
    patch(scheduler, "settle_drafts", lambda s, drafts, right: settle(s, drafts, min(right + 1, drafts)))


def count_one_less_accepted_than_verified(patch: Patch) -> None:
    settle = scheduler.settle_drafts
    patch(scheduler, "settle_drafts", lambda s, drafts, right: settle(s, drafts, max(right - 1, 0)))


def keep_what_wrong_drafts_computed(patch: Patch) -> None:
    settle = scheduler.settle_drafts

    def keep(sequence: Sequence, num_drafts: int, num_right: int) -> None:
        computed = sequence.num_computed
        settle(sequence, num_drafts, num_right)
        sequence.num_computed = computed

    patch(scheduler, "settle_drafts", keep)


def cache_blocks_with_unverified_drafts(patch: Patch) -> None:
    patch(KVAllocator, "num_fixed_blocks", lambda self, sequence: sequence.num_computed // self.block_size)


def cache_a_block_before_its_last_token_is_read(patch: Patch) -> None:
    fixed = KVAllocator.num_fixed_blocks

    def early(self: KVAllocator, sequence: Sequence) -> int:
        on_host = sequence.num_prompt_tokens + len(sequence.output_token_ids) + (sequence.num_pending_drafts > 0)
        return max(fixed(self, sequence), min(sequence.num_computed, on_host) // self.block_size)

    patch(KVAllocator, "num_fixed_blocks", early)


def take_back_from_a_preempted_sequence(patch: Patch) -> None:
    settle = scheduler.settle_drafts

    def always(sequence: Sequence, num_drafts: int, num_right: int) -> None:
        settle(sequence, num_drafts, num_right)
        if sequence.status is not SequenceStatus.RUNNING:
            sequence.num_computed -= num_drafts - num_right

    patch(scheduler, "settle_drafts", always)


def start_where_the_host_believes(patch: Patch) -> None:
    give = Scheduler._give
    patch(Scheduler, "_give", lambda self, *a, **k: give(self, *a, **k)._replace(is_relative=False))


def forget_drafts_in_flight_too_early(patch: Patch) -> None:
    """Those of one step go when the drafts of another are read."""
    settle = scheduler.settle_drafts

    def forget(sequence: Sequence, num_drafts: int, num_right: int) -> None:
        settle(sequence, num_drafts, num_right)
        sequence.num_pending_drafts = 0

    patch(scheduler, "settle_drafts", forget)


def never_forget_drafts_in_flight(patch: Patch) -> None:
    settle = scheduler.settle_drafts

    def remember(sequence: Sequence, num_drafts: int, num_right: int) -> None:
        settle(sequence, num_drafts, num_right)
        sequence.num_pending_drafts += num_drafts

    patch(scheduler, "settle_drafts", remember)


def forget_that_drafts_are_pending_tokens(patch: Patch) -> None:
    give = Scheduler._give

    def count_one(self: Scheduler, sequence: Sequence, *args: Any, **named: Any) -> ScheduledSequence:
        item = give(self, sequence, *args, **named)
        sequence.num_pending -= len(item.drafts)
        return item

    patch(Scheduler, "_give", count_one)


def give_no_blocks_to_drafts(patch: Patch) -> None:
    def take(sequence: Sequence, num_tokens: int, budget: int, *rest: Any) -> tuple[int, ...]:
        drafts, sequence.draft_token_ids = sequence.draft_token_ids, ()
        return () if num_tokens < sequence.num_uncomputed else drafts[: max(budget, 0)]

    patch(scheduler, "take_drafts", take)


def exceed_the_budget(patch: Patch) -> None:
    take = scheduler.take_drafts
    patch(scheduler, "take_drafts", lambda s, tokens, budget, *rest: take(s, tokens, budget + 2, *rest))


def exceed_the_longest_sequence(patch: Patch) -> None:
    """And what was asked for: else a sequence ends before it is as long."""
    take = scheduler.take_drafts

    def beyond(s: Sequence, tokens: int, budget: int, max_len: int, allocator: KVAllocator) -> tuple[int, ...]:
        return take(s, tokens, budget, max_len + 2, allocator)

    patch(scheduler, "take_drafts", beyond)


def draft_in_the_middle_of_a_prompt(patch: Patch) -> None:
    take = scheduler.take_drafts

    def anywhere(s: Sequence, tokens: int, budget: int, max_len: int, allocator: KVAllocator) -> tuple[int, ...]:
        return take(s, s.num_uncomputed, budget, max_len, allocator)

    patch(scheduler, "take_drafts", anywhere)


def deliver_what_follows_a_stop(patch: Patch) -> None:
    """All tokens of a step, though one of them ends the sequence."""
    find = scheduler.find_stop
    seen: dict[Sequence, Any] = {}

    def late(sequence: Sequence, max_len: int) -> Any:
        stop = seen.pop(sequence, None) or find(sequence, max_len)
        if stop is not None and sequence.num_accepted and sequence not in seen and len(sequence.output_token_ids) % 2:
            seen[sequence] = stop
            return None
        return stop

    patch(scheduler, "find_stop", late)


MUTATIONS = [
    count_one_more_accepted_than_verified,
    count_one_less_accepted_than_verified,
    keep_what_wrong_drafts_computed,
    cache_blocks_with_unverified_drafts,
    cache_a_block_before_its_last_token_is_read,
    take_back_from_a_preempted_sequence,
    start_where_the_host_believes,
    forget_drafts_in_flight_too_early,
    never_forget_drafts_in_flight,
    forget_that_drafts_are_pending_tokens,
    give_no_blocks_to_drafts,
    exceed_the_budget,
    exceed_the_longest_sequence,
    draft_in_the_middle_of_a_prompt,
    deliver_what_follows_a_stop,
]
BY_INVARIANTS_ONLY = (
    # What it counts is made anew when it comes back.
    take_back_from_a_preempted_sequence,
    # Hashes of tokens that nobody knows yet: the device sees it only where two sequences agree in them.
    cache_blocks_with_unverified_drafts,
    cache_a_block_before_its_last_token_is_read,
)


def run_workload(check: bool) -> None:
    """The same runs for all mutations: drafts of the device, of which some steps ahead build on others."""
    changed = [{"long_prefill_token_threshold": 3}, {"max_num_batched_tokens": 8}, {"policy": "priority"}]
    for depth, changes in enumerate(changed):
        engine = ToyEngine(make_limits(max_model_len=32, **changes), num_blocks=10, depth=depth, check=check)
        run_random(engine, 100, seed=depth, drafts_by="device")


@pytest.mark.parametrize("check", [True, False])
def test_nothing_is_seen_if_nothing_is_broken(check: bool) -> None:
    run_workload(check)


@pytest.mark.parametrize(
    ("mutation", "check"),
    [(m, check) for m in MUTATIONS for check in (True, False) if check or m not in BY_INVARIANTS_ONLY],
    ids=lambda x: x.__name__ if callable(x) else "with_invariants" if x else "device_alone",
)
def test_mutation_is_seen(mutation: Callable[[Patch], None], check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch.setattr)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError)):
        run_workload(check)
