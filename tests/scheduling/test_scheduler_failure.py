"""A step that raises: its sequences end, the others are recomputed, nothing of it is believed."""

from engine.requests.sequence import FinishReason, SequenceStatus
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
