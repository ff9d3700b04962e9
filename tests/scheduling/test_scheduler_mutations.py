"""Are the proofs able to fail? Each test breaks the scheduler in one way, and invariants and toy device must see it."""

from collections.abc import Callable

import pytest

from engine.requests.sequence import Sequence
from engine.scheduling import allocator, groups, scheduler
from engine.scheduling.allocator import KVAllocator
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.scheduler import Scheduler
from tests.scheduling.toy import ToyEngine, make_limits, run_random

Patch = Callable[[object, str, object], None]


def share_without_counting(patch: Patch) -> None:
    def share(self: BlockPool, blocks: list[int]) -> None:
        for block in blocks:
            if self._refcounts[block] == 0:
                del self._free[block]
                self._refcounts[block] = 1

    patch(BlockPool, "share", share)


def share_without_reviving(patch: Patch) -> None:
    def share(self: BlockPool, blocks: list[int]) -> None:
        for block in blocks:
            self._refcounts[block] += 1

    patch(BlockPool, "share", share)


def evict_without_forgetting_the_hash(patch: Patch) -> None:
    def allocate(self: BlockPool, count: int) -> list[int]:
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._refcounts[block] = 1
        return blocks

    patch(BlockPool, "allocate", allocate)


def free_twice(patch: Patch) -> None:
    release = BlockPool.release

    def twice(self: BlockPool, blocks: list[int]) -> None:
        release(self, blocks)
        release(self, blocks[:1])

    patch(BlockPool, "release", twice)


def free_while_others_hold(patch: Patch) -> None:
    def release(self: BlockPool, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._refcounts[block] = 0
            self._free[block] = None

    patch(BlockPool, "release", release)


def never_free(patch: Patch) -> None:
    patch(BlockPool, "release", lambda self, blocks: None)


def ignore_the_salt(patch: Patch) -> None:
    patch(groups, "root_hash", lambda cache_salt, private_to=None: b"root")


def hash_blocks_without_what_is_before(patch: Patch) -> None:
    chain = allocator.chain_hashes

    def unchained(parent: bytes, tokens: list[int], size: int) -> list[bytes]:
        starts = range(0, len(tokens) - size + 1, size)
        return [chain(b"root", tokens[start : start + size], size)[0] for start in starts]

    patch(allocator, "chain_hashes", unchained)


def compute_nothing_on_a_full_hit(patch: Patch) -> None:
    known = Sequence.num_known.fget
    find = KVAllocator.find_cached

    def find_all(self: KVAllocator, sequence: Sequence, root: bytes) -> list[int]:
        patch(Sequence, "num_known", property(lambda s: known(s) + 1))
        try:
            return find(self, sequence, root)
        finally:
            patch(Sequence, "num_known", property(known))

    patch(KVAllocator, "find_cached", find_all)


def register_pending_tokens(patch: Patch) -> None:
    patch(KVAllocator, "num_fixed_blocks", lambda self, sequence: sequence.num_computed // self.block_size)


def register_before_computing(patch: Patch) -> None:
    fixed = KVAllocator.num_fixed_blocks

    def early(self: KVAllocator, sequence: Sequence) -> int:
        more = (fixed(self, sequence) + 1) * self.block_size
        return fixed(self, sequence) + (more <= sequence.num_prompt_tokens and more <= len(sequence.block_table) * 4)

    patch(KVAllocator, "num_fixed_blocks", early)


def write_to_a_shared_block(patch: Patch) -> None:
    """Count one token more of the last shared block as not computed: its slot is written again, by two."""
    place = KVAllocator.place

    def overlap(self: KVAllocator, sequence: Sequence, cached: list[int]) -> None:
        place(self, sequence, cached)
        sequence.num_computed -= bool(cached)

    patch(KVAllocator, "place", overlap)


def keep_the_old_block_table_on_the_device(patch: Patch) -> None:
    release = KVAllocator.release

    def forgetful(self: KVAllocator, sequence: Sequence) -> None:
        num_sent = sequence.num_sent_blocks
        release(self, sequence)
        sequence.num_sent_blocks = num_sent

    patch(KVAllocator, "release", forgetful)


def give_a_row_twice(patch: Patch) -> None:
    leave = Scheduler._leave_row

    def keep(self: Scheduler, sequence: Sequence) -> None:
        row = sequence.row
        leave(self, sequence)
        self._free_rows.append(row)

    patch(Scheduler, "_leave_row", keep)


def lose_the_pending_token_of_a_preempted_sequence(patch: Patch) -> None:
    preempt = Scheduler._preempt

    def forget(self: Scheduler, sequence: Sequence) -> None:
        preempt(self, sequence)
        sequence.num_pending = 0

    patch(Scheduler, "_preempt", forget)


def forget_length(patch: Patch) -> None:
    stop = scheduler.find_stop
    patch(scheduler, "find_stop", lambda sequence, max_len: stop(sequence, max_len + 5))


MUTATIONS = [
    share_without_counting,
    share_without_reviving,
    evict_without_forgetting_the_hash,
    free_twice,
    free_while_others_hold,
    never_free,
    ignore_the_salt,
    hash_blocks_without_what_is_before,
    compute_nothing_on_a_full_hit,
    register_pending_tokens,
    register_before_computing,
    write_to_a_shared_block,
    keep_the_old_block_table_on_the_device,
    give_a_row_twice,
    lose_the_pending_token_of_a_preempted_sequence,
    forget_length,
]


def run_workload(check: bool) -> None:
    """The same runs for all mutations."""
    for depth, changes in enumerate([{"long_prefill_token_threshold": 3}, {}, {"policy": "priority"}]):
        engine = ToyEngine(make_limits(**changes), num_blocks=10, depth=depth, check=check)
        run_random(engine, 150, seed=depth)


@pytest.mark.parametrize("check", [True, False])
def test_nothing_is_seen_if_nothing_is_broken(check):
    run_workload(check)


@pytest.mark.parametrize("check", [True, False], ids=["with_invariants", "device_alone"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_mutation_is_seen(mutation, check, monkeypatch):
    mutation(monkeypatch.setattr)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError)):
        run_workload(check)
