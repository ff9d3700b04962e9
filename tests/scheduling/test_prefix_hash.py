"""Names of block contents: equal exactly for equal prefixes under equal roots."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduling.prefix_hash import chain_hashes, root_hash

TOKENS = st.lists(st.sampled_from([0, 1, 255, 256, 2**31 - 1]), max_size=24)


def test_only_full_blocks_have_names():
    root = root_hash(None)
    assert [len(chain_hashes(root, range(n), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(len(name) == 32 for name in chain_hashes(root, range(8), 4))


def test_chain_can_be_continued():
    root = root_hash("salt")
    whole = chain_hashes(root, range(12), 4)
    assert whole == [*whole[:1], *chain_hashes(whole[0], range(4, 12), 4)]


def test_name_covers_the_whole_prefix():
    root = root_hash(None)
    left, right = chain_hashes(root, [1, 2, 3, 4], 2), chain_hashes(root, [9, 2, 3, 4], 2)
    assert left[1] != right[1]


def test_roots_differ_by_salt_and_owner():
    roots = [root_hash(salt, owner) for salt in (None, "", "null", "a", '", 1]') for owner in (None, 0, 1)]
    assert len(set(roots)) == len(roots)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(TOKENS, TOKENS, st.sampled_from([1, 2, 3]))
def test_names_are_equal_exactly_for_equal_prefixes(left, right, block_size):
    root = root_hash(None)
    for index, (a, b) in enumerate(
        zip(chain_hashes(root, left, block_size), chain_hashes(root, right, block_size), strict=False), 1
    ):
        assert (a == b) == (left[: index * block_size] == right[: index * block_size])
