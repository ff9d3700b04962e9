"""A step that raises: its sequences end, the others are recomputed, nothing of it is believed."""

from engine.requests.sequence import FinishReason, SequenceStatus
from engine.scheduling.plan import FROM_DRAFT
from tests.scheduling.toy import ToyEngine, make_limits, make_sequences


def test_failed_step_ends_its_sequences_and_recomputes_the_others():
    engine = ToyEngine(make_limits(max_num_seqs=3), num_blocks=40, depth=2)
    older = make_sequences("older", range(8), max_tokens=2)[0]  # in the first plan: unharmed
    failing = make_sequences("failing", range(40, 48), max_tokens=9)[0]
    newer = make_sequences("newer", [*range(40, 48), 1], max_tokens=3)[0]  # shares a block of the failing step
    engine.add([older])
    ok, _ = engine.plan(), engine.plan()  # both of its tokens are in flight
    engine.add([failing])
    bad = engine.plan()
    engine.add([newer])
    engine.plan()
    assert newer.block_table[:2] == failing.block_table[:2] and newer.num_pending == 1
    engine.commit()
    engine.commit()
    assert ok is not bad and older.finished
    assert engine.scheduler.fail(bad) == [failing]
    engine.in_flight.clear()
    engine.device.wipe()
    engine.check_invariants()
    assert (failing.finish_reason, newer.status, newer.num_pending) == (FinishReason.ERROR, SequenceStatus.PREEMPTED, 0)
    assert engine.pool.num_cached == 0
    engine.drain()
    engine.check_results()
    assert newer.finish_reason is FinishReason.LENGTH


def test_plans_before_a_failed_one_are_still_delivered():
    engine = ToyEngine(make_limits(), num_blocks=40, depth=2)
    sequence = make_sequences("a", range(8), max_tokens=2)[0]
    other = make_sequences("b", range(50, 58), max_tokens=4)[0]
    engine.add([sequence])
    engine.plan(), engine.plan()
    engine.add([other])
    bad = engine.plan()
    engine.scheduler.fail(bad)
    engine.in_flight.pop()
    engine.check_invariants()
    engine.commit(), engine.commit()
    assert (sequence.finish_reason, other.finish_reason) == (FinishReason.LENGTH, FinishReason.ERROR)
    engine.drain()
    engine.check_results()


def test_drafts_of_void_plans_are_forgotten():
    """A sequence that the failed step had no tokens left for, and a later one drafts for."""
    engine = ToyEngine(make_limits(max_num_batched_tokens=4), num_blocks=40, depth=2)
    first = make_sequences("first", range(3), max_tokens=12)[0]
    second = make_sequences("second", [50], max_tokens=12)[0]
    engine.add([first])
    engine.add([second])
    engine.plan()
    engine.commit()
    first.draft_token_ids = (FROM_DRAFT,) * 3
    bad = engine.plan()
    assert [item.sequence for item in bad.items] == [first], "its drafts take the whole step"
    second.draft_token_ids = (FROM_DRAFT,) * 2
    void = engine.plan()
    assert [(item.sequence, len(item.drafts)) for item in void.items] == [(first, 0), (second, 2)]
    engine.fail_oldest()
    assert (second.status, second.num_pending, second.num_pending_drafts) == (SequenceStatus.PREEMPTED, 0, 0)
    engine.drain()
    engine.check_results()
    assert second.finish_reason is FinishReason.LENGTH and len(second.output_token_ids) == 12
