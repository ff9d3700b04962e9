"""What each step computes: budget, chunks, admission, overlap, sharing, preemption."""

import pytest

from engine.requests.sequence import FinishReason, SequenceStatus
from engine.scheduling import allocator
from engine.scheduling.plan import StepPlan
from engine.scheduling.prefix_hash import chain_hashes
from tests.scheduling.toy import ToyEngine, make_limits, make_sequences


def shape(plan: StepPlan | None) -> list[tuple[str, int, int, bool]]:
    """(request, start, number of tokens, samples) of each item."""
    assert plan is not None
    return [(i.sequence.request.request_id, i.start, i.num_tokens, i.samples) for i in plan.items]


def make_engine(num_blocks: int = 40, depth: int = 0, **limits) -> ToyEngine:
    return ToyEngine(make_limits(**limits), num_blocks, depth)


def test_running_sequences_come_before_waiting_ones_and_prompts_fill_the_budget():
    engine = make_engine()
    engine.add(make_sequences("a", range(20), max_tokens=9))
    assert shape(engine.plan()) == [("a", 0, 16, False)]
    engine.commit()
    engine.add(make_sequences("b", range(50, 70), max_tokens=9))
    assert shape(engine.plan()) == [("a", 16, 4, True), ("b", 0, 12, False)]
    engine.commit()
    assert shape(engine.plan()) == [("a", 20, 1, True), ("b", 12, 8, True)]


def test_one_sequence_gets_at_most_the_threshold():
    engine = make_engine(long_prefill_token_threshold=5)
    engine.add(make_sequences("a", range(12), max_tokens=2))
    engine.add(make_sequences("b", range(50, 53), max_tokens=2))
    assert shape(engine.plan()) == [("a", 0, 5, False), ("b", 0, 3, True)]
    engine.commit()
    assert shape(engine.plan()) == [("a", 5, 5, False), ("b", 3, 1, True)]


def test_without_chunks_a_prompt_runs_whole_or_waits_and_nobody_overtakes():
    engine = make_engine(enable_chunked_prefill=False)
    engine.add(make_sequences("a", range(10), max_tokens=3))
    engine.add(make_sequences("b", range(50, 60), max_tokens=3))
    engine.add(make_sequences("c", [9], max_tokens=3))
    assert shape(engine.plan()) == [("a", 0, 10, True)]
    engine.commit()
    assert shape(engine.plan()) == [("a", 10, 1, True), ("b", 0, 10, True), ("c", 0, 1, True)]


def test_without_chunks_only_a_recomputation_longer_than_the_budget_is_split():
    engine = make_engine(num_blocks=12, enable_chunked_prefill=False)
    second = make_sequences("b", [2] * 8, max_tokens=20, skip_reading_prefix_cache=True)[0]
    engine.add(make_sequences("a", [1] * 15, max_tokens=15))
    engine.add([second])
    comeback = None
    while engine.scheduler.has_work:
        plan = engine.plan()
        if second.num_preemptions and comeback is None:
            comeback = next((item for item in plan.items if item.sequence is second), None)
        engine.commit()
    assert comeback is not None and comeback.starts_row and not comeback.samples and comeback.num_tokens > 1
    engine.check_results()


def test_admission_needs_room_for_the_whole_prompt():
    engine = make_engine(num_blocks=9)  # 8 blocks of 4
    engine.add(make_sequences("a", range(16), max_tokens=4))
    engine.add(make_sequences("b", range(50, 66), max_tokens=4))  # 5 blocks with its first output; 4 are free
    engine.add(make_sequences("c", [1], max_tokens=4))
    assert shape(engine.plan()) == [("a", 0, 16, True)]
    engine.commit()
    assert shape(engine.plan()) == [("a", 16, 1, True)]  # c would fit, but does not overtake b
    engine.drain()
    engine.check_results()
    assert engine.scheduler.stats().num_preemptions == 0


def test_blocks_that_a_split_prompt_still_needs_are_not_given_to_newcomers():
    engine = make_engine(num_blocks=11, long_prefill_token_threshold=4)  # 10 blocks of 4
    engine.add(make_sequences("a", range(24), max_tokens=2))  # 7 blocks in the end, 1 after its first step
    engine.add(make_sequences("b", range(50, 66), max_tokens=2))  # 5 blocks
    assert shape(engine.plan()) == [("a", 0, 4, False)]
    engine.commit()
    assert shape(engine.plan()) == [("a", 4, 4, False)]
    engine.drain()
    assert engine.scheduler.stats().num_preemptions == 0


def test_no_row_no_admission():
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add(make_sequences(name, [ord(name)], max_tokens=2))
    assert [item[0] for item in shape(engine.plan())] == ["a", "b"]
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)
    engine.drain()
    engine.check_results()


def test_priority_policy_serves_low_numbers_first_and_preempts_high_ones():
    engine = make_engine(num_blocks=7, policy="priority", max_num_seqs=2)
    low = make_sequences("low", [1] * 6, priority=5, max_tokens=12)[0]
    high = make_sequences("high", [2] * 6, priority=-5, max_tokens=12, seed=1)[0]
    last = make_sequences("last", [3], priority=6, max_tokens=2)[0]
    for sequence in (last, low, high):
        engine.add([sequence])
    assert [item[0] for item in shape(engine.plan())] == ["high", "low"]
    engine.commit()
    engine.drain()
    assert (high.num_preemptions, low.num_preemptions > 0) == (0, True)
    engine.check_results()


def test_fcfs_ignores_priority():
    engine = make_engine(max_num_seqs=1)
    engine.add(make_sequences("first", [1], priority=5))
    engine.add(make_sequences("second", [2], priority=-5))
    assert [item[0] for item in shape(engine.plan())] == ["first"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_next_steps_are_planned_before_tokens_are_read(depth):
    engine = make_engine(depth=depth)
    sequence = make_sequences("a", range(6), max_tokens=9)[0]
    engine.add([sequence])
    plans = [engine.plan() for _ in range(depth + 1)]
    assert [shape(plan)[0][1:] for plan in plans] == [(0, 6, True), *[(6 + i, 1, True) for i in range(depth)]]
    assert (sequence.num_pending, sequence.num_computed, sequence.num_known) == (depth + 1, 6 + depth, 7 + depth)
    assert sequence.token_ids(4, 8) == [4, 5, -1, -1]
    engine.drain()
    engine.check_results()


def test_nothing_is_planned_beyond_max_tokens():
    engine = make_engine(depth=5)
    engine.add(make_sequences("a", range(6), max_tokens=2))
    assert [shape(engine.plan()), shape(engine.plan())] == [[("a", 0, 6, True)], [("a", 6, 1, True)]]
    assert engine.plan() is None
    assert engine.scheduler.has_work
    engine.drain()


def test_tokens_sampled_after_the_end_are_dropped():
    engine = make_engine(depth=2)
    sequence = make_sequences("a", range(6), max_tokens=9)[0]
    engine.add([sequence], stop_at=2)
    for _ in range(4):
        engine.plan()
    for _ in range(2):
        engine.commit()
    assert (sequence.finish_reason, sequence.stop_reason, len(sequence.output_token_ids)) == (
        FinishReason.STOP,
        "text",
        2,
    )
    assert (engine.scheduler.has_work, engine.scheduler.num_in_flight) == (False, 2)
    engine.drain()
    assert len(sequence.output_token_ids) == 2
    engine.check_results()


def test_rows_and_blocks_tell_the_device_what_is_new():
    engine = make_engine(max_num_seqs=1)
    engine.add(make_sequences("a", range(6), max_tokens=4))
    engine.add(make_sequences("b", [7], max_tokens=1))
    seen = []
    while engine.scheduler.has_work:
        item = engine.plan().items[0]
        new_blocks = len(item.sequence.block_table) - item.first_new_block
        seen.append((item.sequence.request.request_id, item.row, item.starts_row, item.first_new_block, new_blocks))
        engine.commit()
    assert seen == [
        ("a", 0, True, 0, 2),  # positions 0-5
        ("a", 0, False, 2, 0),
        ("a", 0, False, 2, 0),
        ("a", 0, False, 2, 1),  # position 8
        ("b", 0, True, 0, 1),
    ]


def test_equal_prefixes_share_blocks_even_within_one_step():
    engine = make_engine(max_num_batched_tokens=32)
    first, second = make_sequences("a", range(12))[0], make_sequences("b", [*range(10), 99, 98])[0]
    engine.add([first])
    engine.add([second])
    assert shape(engine.plan()) == [("a", 0, 12, True), ("b", 8, 4, True)]
    assert first.block_table[:2] == second.block_table[:2] and first.block_table[2] != second.block_table[2]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    stats = engine.scheduler.stats()
    assert (stats.num_prefix_queried_tokens, stats.num_prefix_hit_tokens) == (24, 8)
    engine.drain()
    engine.check_results()


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_at_least_one_token_is_computed(length, hit):
    engine = make_engine()
    engine.add(make_sequences("a", range(length)))
    engine.drain()
    engine.add(make_sequences("b", range(length)))
    assert shape(engine.plan()) == [("b", hit, length - hit, True)]


def test_outputs_are_shared_once_they_are_read():
    engine = make_engine(depth=1)
    first = make_sequences("a", range(4), max_tokens=9)[0]
    engine.add([first])
    engine.drain()
    text = [*range(4), *first.output_token_ids]  # 13 tokens; the last has no KV
    engine.add(make_sequences("b", [*text, 1]))
    assert shape(engine.plan()) == [("b", 12, 2, True)]


def test_salts_keep_requests_apart():
    engine = make_engine()
    for name, salt in (("a", None), ("b", "x"), ("c", "y"), ("d", "x")):
        engine.add(make_sequences(name, range(9), cache_salt=salt, max_tokens=1))
        plan = engine.plan()
        engine.commit()
        assert shape(plan)[0][1] == (8 if name == "d" else 0)


@pytest.mark.parametrize("params", [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}])
def test_some_requests_compute_every_prompt_token(params):
    engine = make_engine()
    engine.add(make_sequences("a", range(9), **params))
    engine.drain()
    engine.add(make_sequences("b", range(9), **params))
    assert shape(engine.plan()) == [("b", 0, 9, True)]
    engine.commit()
    engine.add(make_sequences("c", range(9)))  # it does not read, but others read what it wrote
    assert ("c", 8, 1, True) in shape(engine.plan())
    assert engine.scheduler.stats().num_prefix_queried_tokens == 9


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_share_the_prompt_with_and_without_prefix_caching(caching):
    engine = make_engine(enable_prefix_caching=caching, depth=1)
    siblings = make_sequences("a", range(20), n=3, max_tokens=5)
    engine.add(siblings)
    engine.add(make_sequences("b", [7], max_tokens=1))
    # The leader's full blocks are not all planned yet: the others wait for them, and do not keep b from running.
    assert shape(engine.plan()) == [("a", 0, 16, False)]
    engine.commit()
    assert shape(engine.plan()) == [("a", 16, 4, True), ("a", 16, 4, True), ("a", 16, 4, True), ("b", 0, 1, True)]
    assert len({tuple(s.block_table[:4]) for s in siblings}) == 1
    assert len({s.block_table[4] for s in siblings}) == 3
    engine.drain()
    engine.check_results()
    engine.add(make_sequences("c", range(20), max_tokens=1))
    assert shape(engine.plan())[0][1] == (16 if caching else 0)


def test_waiting_siblings_let_others_pass():
    engine = make_engine(long_prefill_token_threshold=4)
    engine.add(make_sequences("a", range(20), n=2))
    engine.add(make_sequences("b", [7, 8]))
    assert shape(engine.plan()) == [("a", 0, 4, False), ("b", 0, 2, True)]


def test_siblings_go_on_alone_if_the_leader_ends_early():
    engine = make_engine()
    siblings = make_sequences("a", range(20), n=3, max_tokens=3)
    engine.add(siblings)
    engine.plan()
    engine.scheduler.finish(siblings[0], FinishReason.ABORT)
    engine.commit()
    assert shape(engine.plan()) == [("a", 16, 4, True), ("a", 16, 4, True)]
    engine.drain()
    engine.check_results()
    assert [s.finish_reason for s in siblings] == [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.LENGTH]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_preempted_sequence_keeps_its_tokens_and_comes_back(depth):
    engine = make_engine(num_blocks=7, depth=depth)
    first, second = (
        make_sequences("a", [1] * 6, max_tokens=16)[0],
        make_sequences("b", [2] * 6, max_tokens=16, seed=1)[0],
    )
    engine.add([first])
    engine.add([second])
    while not second.num_preemptions:
        plan = engine.plan()
        if len(engine.in_flight) > depth and not second.num_preemptions:
            engine.commit()
    assert plan.preempted == (second,) and second.status is SequenceStatus.PREEMPTED
    assert (second.num_pending, second.num_computed, second.block_table, second.row) == (depth, 0, [], None)
    num_read = len(second.output_token_ids)
    # Not admitted before its tokens are read, even if there were room.
    engine.scheduler.abort("a")
    while second.num_pending:
        assert engine.plan() is None
        engine.commit()
    assert len(second.output_token_ids) == num_read + depth
    plan = engine.plan()
    assert plan.items[0].sequence is second and plan.items[0].starts_row and plan.items[0].start > 0
    engine.drain()
    engine.check_results()


def test_sequence_that_preempts_itself_lets_the_others_run():
    engine = make_engine(num_blocks=5)
    first, second = make_sequences("a", [1] * 8, max_tokens=5)[0], make_sequences("b", [2] * 3, max_tokens=5)[0]
    engine.add([first])
    engine.step()
    engine.add([second])
    engine.drain()
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    engine.check_results()


def test_sequence_as_long_as_the_pool_ends_with_length():
    engine = make_engine(num_blocks=4, depth=1)  # 3 blocks of 4: 12 tokens computed, the 13th is sampled last
    assert engine.scheduler.max_len == 13
    sequence = make_sequences("a", range(5), max_tokens=50)[0]
    engine.add([sequence])
    engine.add(make_sequences("b", range(12), max_tokens=50))
    engine.drain()
    assert (len(sequence.output_token_ids), sequence.finish_reason) == (8, FinishReason.LENGTH)
    engine.check_results()


def test_reset_forgets_prefixes_but_disturbs_nobody():
    engine = make_engine()
    engine.add(make_sequences("a", range(9), max_tokens=8))
    engine.step()
    engine.scheduler.reset_prefix_cache()
    engine.add(make_sequences("b", range(9), max_tokens=1))
    assert shape(engine.plan()) == [("a", 9, 1, True), ("b", 0, 9, True)]
    engine.drain()
    engine.check_results()


def test_abort_ends_all_sequences_wherever_they_are():
    engine = make_engine(max_num_seqs=2, depth=1)
    siblings = make_sequences("a", range(3), n=4, max_tokens=5)
    engine.add(siblings)
    engine.plan()
    assert engine.scheduler.abort("a") == siblings
    assert {s.finish_reason for s in siblings} == {FinishReason.ABORT}
    assert engine.pool.num_free == engine.pool.num_usable
    engine.drain()
    assert [s.output_token_ids for s in siblings] == [[]] * 4


def test_each_block_is_hashed_once(monkeypatch):
    """Steps must not take time in proportion to what was computed before."""
    num_hashed = 0

    def count(parent, tokens, block_size):
        nonlocal num_hashed
        num_hashed += len(tokens) // block_size
        return chain_hashes(parent, tokens, block_size)

    monkeypatch.setattr(allocator, "chain_hashes", count)
    engine = make_engine(depth=1)
    engine.add(make_sequences("a", range(9), max_tokens=40))
    engine.drain()
    assert num_hashed == (9 + 39) // 4
