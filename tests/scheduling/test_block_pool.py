"""`BlockPool`: who holds what, who is evicted first, what can be found."""

import pytest

from engine.scheduling.block_pool import BlockPool

HASHES = [bytes([i]) * 32 for i in range(16)]


def pool_with_prefix(num_blocks: int, length: int) -> tuple[BlockPool, list[int]]:
    """A pool and the blocks of one sequence in it, all registered."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(length)
    for block, content_hash in zip(blocks, HASHES, strict=False):
        pool.register(block, content_hash)
    return pool, blocks


def test_null_block_is_never_given_out():
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="1 blocks wanted, 0 are free"):
        pool.allocate(1)
    with pytest.raises(ValueError, match="null block"):
        pool.share([0])
    with pytest.raises(ValueError, match="at least 2"):
        BlockPool(1)


def test_usage_counts_held_blocks_only():
    pool, blocks = pool_with_prefix(5, 2)
    assert (pool.num_usable, pool.num_free, pool.usage, pool.num_cached) == (4, 2, 0.5, 2)
    pool.release(blocks)
    assert (pool.num_free, pool.usage, pool.num_cached) == (4, 0.0, 2)
    pool.check_invariants([])


def test_end_of_a_prefix_is_evicted_before_its_start():
    pool, blocks = pool_with_prefix(4, 3)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert [pool.find(h) for h in HASHES[:3]] == [blocks[0], blocks[1], None]
    assert pool.allocate(1) == [blocks[1]]
    assert [pool.find(h) for h in HASHES[:3]] == [blocks[0], None, None]


def test_least_recently_used_prefix_is_evicted_first():
    pool = BlockPool(5)
    old, new = pool.allocate(2), pool.allocate(2)
    for block, content_hash in zip(old + new, HASHES, strict=False):
        pool.register(block, content_hash)
    pool.release(old)
    pool.release(new)
    pool.share([old[0], old[1]])  # used again: now the other is the older
    pool.release(old)
    assert pool.allocate(2) == [new[1], new[0]]
    assert [pool.find(h) for h in HASHES[:4]] == [*old, None, None]


def test_blocks_that_nobody_can_find_go_before_cached_ones():
    pool, cached = pool_with_prefix(5, 2)
    other = pool.allocate(2)
    pool.release(other)
    pool.release(cached)
    third = pool.allocate(2)
    assert set(third) == set(other)
    pool.release(third)  # most recently released, and still first to go
    assert set(pool.allocate(2)) == set(other)
    assert [pool.find(h) for h in HASHES[:2]] == cached


def test_shared_block_is_free_after_its_last_release():
    pool, blocks = pool_with_prefix(4, 1)
    pool.share(blocks)
    assert pool.refcount(blocks[0]) == 2
    pool.release(blocks)
    assert pool.num_free == 2
    pool.check_invariants([blocks])
    pool.release(blocks)
    assert pool.num_free == 3
    with pytest.raises(ValueError, match=f"block {blocks[0]} is released more often"):
        pool.release(blocks)


def test_free_cached_block_is_revived_with_its_content():
    pool, blocks = pool_with_prefix(4, 2)
    pool.release(blocks)
    assert pool.num_free_among(blocks) == 2
    pool.share(blocks[:1])
    assert (pool.num_free, pool.num_free_among(blocks)) == (2, 1)
    assert blocks[0] not in pool.allocate(2)
    assert pool.find(HASHES[0]) == blocks[0]


def test_equal_content_is_found_once():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.register(first, HASHES[0])
    pool.register(second, HASHES[0])
    assert pool.find(HASHES[0]) == first
    assert pool.hash_of(second) is None
    pool.check_invariants([[first], [second]])
    pool.release([second])
    assert pool.find(HASHES[0]) == first


def test_register_refuses_free_blocks_and_second_names():
    pool, blocks = pool_with_prefix(4, 1)
    with pytest.raises(ValueError, match="under another hash"):
        pool.register(blocks[0], HASHES[5])
    pool.register(blocks[0], HASHES[0])  # the same again is nothing new
    with pytest.raises(ValueError, match="is free"):
        pool.register(3, HASHES[1])


def test_reset_forgets_names_but_not_holders():
    pool, blocks = pool_with_prefix(6, 2)
    gone, kept = blocks
    pool.release([gone])
    pool.reset_prefix_cache()
    assert pool.num_cached == 0
    assert [pool.find(h) for h in HASHES[:2]] == [None, None]
    assert kept not in pool.allocate(4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool._refcounts.__setitem__(1, 2), "refcount 2, but 1"),
        (lambda pool: pool._refcounts.__setitem__(4, 1), "refcount 1, but 0"),
        (lambda pool: pool._refcounts.__setitem__(0, 1), "null block"),
        (lambda pool: pool._free.__setitem__(0, None), "null block"),
        (lambda pool: pool._free.__setitem__(1, None), "block 1: refcount 1, free: True"),
        (lambda pool: pool._free.pop(4), "block 4: refcount 0, free: False"),
        (lambda pool: pool._free.__setitem__(9, None), "outside the pool"),
        (lambda pool: pool._hash_of.pop(1), "found under a hash"),
        (lambda pool: pool._block_of.pop(HASHES[0]), "not found"),
    ],
)
def test_invariants_see_damage(damage, message):
    pool, blocks = pool_with_prefix(5, 2)
    pool.check_invariants([blocks])
    damage(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_invariants([blocks])


def test_invariants_see_a_cached_block_that_would_go_too_early():
    pool, blocks = pool_with_prefix(5, 2)
    pool.release(blocks)
    pool._free.move_to_end(blocks[0], last=False)
    with pytest.raises(AssertionError, match="comes before"):
        pool.check_invariants([])
