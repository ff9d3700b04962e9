"""What the scheduler refuses, and the order of its queues."""

import random

import pytest

from engine.errors import ConfigError, ContextLengthError, InvalidRequestError, QueueFullError
from engine.requests.sequence import FinishReason
from engine.scheduling.policy import ORDER_KEYS, SequenceQueue
from tests.scheduling.toy import ToyEngine, make_limits, make_sequences


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_model_len": 1}, "max_model_len must be at least 2, got 1"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens must be at least max_num_seqs=4, got 3"),
        ({"long_prefill_token_threshold": -1}, "must be 0 or more, got -1"),
        ({"long_prefill_token_threshold": 5, "enable_chunked_prefill": False}, "forbids"),
        ({"policy": "lottery"}, "must be one of fcfs, priority; got 'lottery'"),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs must be at least 1, got 0"),
        ({"max_num_queued_tokens": 0}, "max_num_queued_tokens must be at least 1, got 0"),
    ],
)
def test_limits_refuse_contradictions(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_limits(**changes)


def test_queue_keeps_the_order_of_its_policy():
    rng = random.Random(0)
    for policy, order in (("fcfs", lambda s: s.arrival), ("priority", lambda s: (s.request.priority, s.arrival))):
        sequences = [make_sequences(f"r{i}", [1], priority=rng.randrange(3))[0] for i in range(30)]
        for arrival, sequence in enumerate(sequences):
            sequence.arrival = arrival
        queue = SequenceQueue(ORDER_KEYS[policy])
        for sequence in rng.sample(sequences, 30):
            queue.add(sequence)
        queue.check_invariants()
        assert list(queue) == sorted(sequences, key=order)
        for sequence in rng.sample(sequences, 10):
            queue.remove(sequence)
            sequences.remove(sequence)
            with pytest.raises(ValueError, match="not in the queue"):
                queue.remove(sequence)
        assert list(queue) == sorted(sequences, key=order)
        assert (len(queue), queue[-1]) == (20, max(sequences, key=order))
        queue._items.reverse()
        with pytest.raises(AssertionError, match="out of order"):
            queue.check_invariants()


def test_prompts_that_can_never_run_are_refused_with_numbers():
    engine = ToyEngine(make_limits(max_model_len=64), num_blocks=6, depth=0)  # 5 blocks of 4 tokens
    with pytest.raises(
        ContextLengthError, match=r"maximum context length is 64 tokens\. However, your prompt contains 64"
    ):
        engine.add(make_sequences("long", [1] * 64))
    with pytest.raises(ContextLengthError, match="21 tokens, but the KV cache holds only 20"):
        engine.add(make_sequences("big", [1] * 21))
    engine.add(make_sequences("fits", [1] * 20, max_tokens=4))
    whole = ToyEngine(make_limits(enable_chunked_prefill=False), num_blocks=20, depth=0)
    with pytest.raises(ContextLengthError, match="17 tokens, but one step computes at most max_num_batched_tokens=16"):
        whole.add(make_sequences("whole", [1] * 17))
    assert not whole.scheduler.has_work
    engine.drain()


def test_live_request_ids_are_unique():
    engine = ToyEngine(make_limits(), num_blocks=20, depth=0)
    engine.add(make_sequences("r", [1, 2]))
    with pytest.raises(InvalidRequestError, match="'r' is in use") as caught:
        engine.add(make_sequences("r", [3]))
    assert caught.value.parameter == "request_id"
    engine.drain()
    engine.add(make_sequences("r", [3]))  # ended: the id is free again
    engine.drain()


def test_all_sequences_of_a_request_come_at_once():
    engine = ToyEngine(make_limits(), num_blocks=20, depth=0)
    sequences = make_sequences("r", [1, 2], n=2)
    for wrong in (sequences[:1], sequences[::-1], [*sequences, *sequences]):
        with pytest.raises(ValueError, match="n=2 sequences"):
            engine.scheduler.add(wrong)
    assert not engine.scheduler.has_work


def test_queue_limit_in_requests():
    engine = ToyEngine(make_limits(max_num_queued_reqs=2, max_num_seqs=1), num_blocks=20, depth=0)
    engine.add(make_sequences("a", [1], n=3))  # three sequences, one request
    engine.add(make_sequences("b", [2]))
    with pytest.raises(QueueFullError, match="2 requests are queued; max_num_queued_reqs=2"):
        engine.add(make_sequences("c", [3]))
    engine.step()  # `a` is admitted, though only one of its sequences
    engine.add(make_sequences("c", [3]))
    with pytest.raises(QueueFullError):
        engine.add(make_sequences("d", [4]))
    engine.scheduler.abort("c")
    engine.add(make_sequences("d", [4]))
    engine.drain()
    engine.check_results()


def test_queue_limit_in_prompt_tokens():
    engine = ToyEngine(make_limits(max_num_queued_tokens=10), num_blocks=20, depth=0)
    engine.add(make_sequences("alone", [1] * 30))  # nobody waits, and waiting would not make it shorter
    with pytest.raises(
        QueueFullError, match="30 prompt tokens are queued; 1 more would exceed max_num_queued_tokens=10"
    ):
        engine.add(make_sequences("b", [1]))
    engine.step()
    engine.add(make_sequences("c", [1] * 6))
    engine.add(make_sequences("d", [1] * 4))
    with pytest.raises(QueueFullError):
        engine.add(make_sequences("e", [1]))
    engine.drain()


def test_preempted_requests_do_not_count_as_queued():
    engine = ToyEngine(make_limits(max_num_queued_reqs=1), num_blocks=5, depth=0)
    engine.add(make_sequences("a", [1] * 4, max_tokens=9, seed=1))
    engine.step()
    engine.add(make_sequences("b", [2] * 4, max_tokens=9, seed=2))
    while engine.scheduler.stats().num_preemptions == 0:
        engine.step()
    assert (engine.scheduler.num_waiting, engine.scheduler.stats().num_queued_reqs) == (1, 0)
    engine.drain()
    engine.check_results()


def test_plans_are_committed_in_order_and_whole():
    engine = ToyEngine(make_limits(), num_blocks=20, depth=9)
    engine.add(make_sequences("r", [1, 2], max_tokens=5))
    first, second = engine.plan(), engine.plan()
    scheduler = engine.scheduler
    with pytest.raises(ValueError, match=r"plan 1 is not the oldest in flight: \[0, 1\]"):
        scheduler.commit(second, [[1]])
    with pytest.raises(ValueError, match="has 1 items, but 2 tokens came"):
        scheduler.commit(first, [[1], [2]])
    engine.commit()
    with pytest.raises(ValueError, match="not the oldest"):
        scheduler.commit(first, [[1]])
    with pytest.raises(ValueError, match="plan 0 is not in flight"):
        scheduler.fail(first)
    with pytest.raises(ValueError, match="item 0 samples after 0 drafts, and 0 tokens came"):
        scheduler.commit(second, [[]])


def test_aborting_an_unknown_or_ended_request_does_nothing():
    engine = ToyEngine(make_limits(), num_blocks=20, depth=0)
    assert engine.scheduler.abort("nobody") == []
    sequences = make_sequences("r", [1], n=2, max_tokens=1)
    engine.add(sequences)
    engine.drain()
    assert engine.scheduler.abort("r") == []
    assert {s.finish_reason for s in sequences} == {FinishReason.LENGTH}
