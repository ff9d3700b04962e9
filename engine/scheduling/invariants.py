"""What must hold between two calls of the scheduler, whatever happened before: pure functions, for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.requests.sequence import Sequence, SequenceStatus
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.groups import RequestGroup
from engine.scheduling.plan import MOST_DRAFTS, StepPlan


def _require(condition: bool, sequence: Sequence, message: str) -> None:
    if not condition:
        raise AssertionError(f"sequence {sequence.index} of request {sequence.request.request_id!r}: {message}")


def check_running(sequence: Sequence, pool: BlockPool, block_size: int) -> None:
    """A running sequence holds exactly the blocks of its computed tokens, and those that it writes to are its own.

    Raises:
        AssertionError: with what is wrong.
    """
    table, computed = sequence.block_table, sequence.num_computed
    _require(sequence.status is SequenceStatus.RUNNING, sequence, f"is among the running, but {sequence.status}")
    _require(0 < computed < sequence.num_known, sequence, f"{computed} tokens computed of {sequence.num_known}")
    needed, most = -(-computed // block_size), -(-(computed + MOST_DRAFTS) // block_size)
    _require(needed <= len(table) <= most, sequence, f"{len(table)} blocks for {computed} tokens")
    if sequence.num_drafted == 0:  # blocks of wrong drafts stay, for the tokens to come
        _require(len(table) == needed, sequence, f"{len(table)} blocks for {computed} tokens")
    num_sent = sequence.num_sent_blocks
    _require(num_sent == len(table), sequence, f"{num_sent} of {len(table)} blocks sent")
    _require(len(set(table)) == len(table), sequence, f"a block is twice in the table {table}")
    num_final = min(computed, sequence.num_prompt_tokens + len(sequence.output_token_ids)) // block_size
    num_cached = sequence.num_cached_blocks
    _require(num_cached == num_final, sequence, f"{num_cached} blocks are registered, {num_final} are final")
    for index, block in enumerate(table):
        content_hash = pool.hash_of(block)
        if index < sequence.num_cached_blocks:
            good = content_hash is None or content_hash == sequence.block_hashes[index]
            _require(good, sequence, f"block {block} is registered under the hash of another content")
        else:
            _require(content_hash is None, sequence, f"block {block} is registered, but not final")
            _require(pool.refcount(block) == 1, sequence, f"block {block} is still written to, but shared")


def check_waiting(sequence: Sequence) -> None:
    """A waiting sequence holds nothing.

    Raises:
        AssertionError: with what is wrong.
    """
    waits = sequence.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
    _require(waits, sequence, f"is among the waiting, but {sequence.status}")
    _require(not sequence.block_table and sequence.row is None, sequence, "waits, but holds blocks or a row")
    counters = (sequence.num_computed, sequence.num_cached_blocks, sequence.num_sent_blocks)
    _require(counters == (0, 0, 0), sequence, f"waits, but its counters are {counters}")


def check_rows(running: Iterable[Sequence], free_rows: list[int], num_rows: int) -> None:
    """Every row is either free or owned by one running sequence.

    Raises:
        AssertionError: with the rows.
    """
    owned = [sequence.row for sequence in running]
    if Counter([*owned, *free_rows]) != Counter(range(num_rows)):
        raise AssertionError(f"rows owned {owned}, free {free_rows}, of {num_rows}")


def check_pending(in_flight: Iterable[StepPlan], live: Iterable[Sequence]) -> None:
    """Every pending token of a live sequence is sampled by a plan in flight, and every pending draft verified by one.

    Raises:
        AssertionError: with the two counts.
    """
    sampled: Counter[int] = Counter()
    verified: Counter[int] = Counter()
    for plan in in_flight:
        for item in plan.items:
            sampled[id(item.sequence)] += item.samples and 1 + len(item.drafts)
            verified[id(item.sequence)] += len(item.drafts)
    for sequence in live:
        pending, expected = sequence.num_pending, sampled[id(sequence)]
        _require(pending == expected, sequence, f"{pending} pending tokens, {expected} in flight")
        pending, expected = sequence.num_pending_drafts, verified[id(sequence)]
        _require(pending == expected, sequence, f"{pending} pending drafts, {expected} in flight")


def check_groups(groups: Iterable[RequestGroup], queued: tuple[int, int], num_alive: int) -> None:
    """Counters of the groups agree with their sequences, of which so many run or wait, and those of the queue
    (requests, tokens) with the groups.

    Raises:
        AssertionError: with what is wrong.
    """
    num_reqs = num_tokens = num_unfinished = 0
    for group in groups:
        name, unfinished = group.request.request_id, sum(not sequence.finished for sequence in group.sequences)
        if not 0 < unfinished == group.num_unfinished:
            raise AssertionError(f"request {name!r}: {group.num_unfinished} unfinished, but {unfinished} are")
        admitted = any(s.status in (SequenceStatus.RUNNING, SequenceStatus.PREEMPTED) for s in group.sequences)
        if group.queued and admitted:
            raise AssertionError(f"request {name!r} is queued, but was admitted")
        num_unfinished += unfinished
        num_reqs += group.queued
        num_tokens += group.queued * group.request.num_prompt_tokens
    if num_unfinished != num_alive:
        raise AssertionError(f"{num_unfinished} sequences are unfinished, but {num_alive} run or wait")
    if queued != (num_reqs, num_tokens):
        raise AssertionError(f"{queued} requests and tokens counted as queued, but it is {(num_reqs, num_tokens)}")
