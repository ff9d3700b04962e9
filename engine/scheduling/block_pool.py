"""`BlockPool`: the owner of KV block ids."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0  # padding rows write there; it is never given to a sequence


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


class BlockPool:
    """Ids `1 .. num_blocks - 1`: which are free, how many sequences hold each, and which content can be found again.

    A block is *free* if no sequence holds it, and *cached* if it can be found by the hash of its content. A cached
    block stays so when it becomes free, until its id is needed for something else:

        free list   [ without hash | cached, least recently used ........ most recently used ]
                      ^ allocate takes from here                       release puts cached blocks here ^

    Several blocks may hold equal content; the first that was registered is the one that is found. The free list is an
    `OrderedDict` (in CPython a linked list in C): first out, last in, and removal from the middle take constant time.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (block {NULL_BLOCK} is never given out), got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._refcounts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can have."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds; cached ones included, since they can be evicted."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks, free or held, that can be found by their hash."""
        return len(self._hash_of)

    @property
    def usage(self) -> float:
        """Fraction of the usable blocks that sequences hold, 0 to 1."""
        return 1.0 - len(self._free) / self.num_usable

    def refcount(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._refcounts[block]

    def find(self, content_hash: bytes) -> int | None:
        """The block with this content, or None. Whoever wants it must `share` it before the next `allocate`."""
        return self._block_of.get(content_hash)

    def hash_of(self, block: int) -> bytes | None:
        """The hash under which the block can be found, or None."""
        return self._hash_of.get(block)

    def count_lookup(self, num_queried: int, num_hit: int) -> None:
        """Count one look-up of a prompt, in tokens."""
        self.num_queried_tokens += num_queried
        self.num_hit_tokens += num_hit

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free: that many fewer would be left after `share`."""
        refcounts = self._refcounts
        return sum(refcounts[block] == 0 for block in blocks)

    def allocate(self, count: int) -> list[int]:
        """Take blocks for new content, evicting cached ones if no others are left.

        Raises:
            ValueError: fewer than `count` are free; the caller compares with `num_free` first.
        """
        free, hash_of, refcounts = self._free, self._hash_of, self._refcounts
        if count > len(free):
            raise ValueError(f"{count} blocks wanted, {len(free)} are free")
        blocks: list[int] = []
        for _ in range(count):
            block, _none = free.popitem(last=False)
            content_hash = hash_of.pop(block, None)
            if content_hash is not None:
                del self._block_of[content_hash]
            refcounts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `find` gave, once more; free ones leave the free list with their content.

        Raises:
            ValueError: a block is the null block.
        """
        for block in blocks:
            if block == NULL_BLOCK:
                raise ValueError("the null block cannot be shared")
            if self._refcounts[block] == 0:
                del self._free[block]
            self._refcounts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of the blocks of one sequence, given in the order of its tokens.

        Raises:
            ValueError: a block is released more often than it was taken.
        """
        # In reverse: of one prefix the end is evicted first. The other way round the first eviction would make all
        # blocks after it unreachable, since a look-up stops at the first block that it does not find.
        for block in reversed(blocks):
            count = self._refcounts[block] - 1
            if count < 0:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._refcounts[block] = count
            if count == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)  # nobody can find it: reuse it before evicting anything

    def register(self, block: int, content_hash: bytes) -> None:
        """Make a held, full block findable. If equal content is findable already, that stays the one.

        Raises:
            ValueError: the block is free, or is registered under another hash.
        """
        if self._refcounts[block] == 0:
            raise ValueError(f"block {block} is free and cannot be registered")
        if self._hash_of.get(block, content_hash) != content_hash:
            raise ValueError(f"block {block} is registered under another hash")
        if content_hash not in self._block_of:
            self._block_of[content_hash] = block
            self._hash_of[block] = content_hash

    def reset_prefix_cache(self) -> None:
        """Forget all hashes. Blocks in use stay valid for those who hold them; nobody else will find them."""
        self._hash_of.clear()
        self._block_of.clear()

    def check_invariants(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Prove that no block is lost, held twice as free, or findable under a stale name. Takes time in proportion to
        the pool.

        Args:
            block_tables: the tables of all sequences that hold blocks.

        Raises:
            AssertionError: with what is wrong.
        """
        _require(self._refcounts[NULL_BLOCK] == 0, "the null block is held")
        _require(NULL_BLOCK not in self._free, "the null block is free")
        held = Counter(block for table in block_tables for block in table)
        for block in range(1, self.num_blocks):
            count = self._refcounts[block]
            _require(count == held[block], f"block {block}: refcount {count}, but {held[block]} sequences hold it")
            _require(
                (count == 0) == (block in self._free), f"block {block}: refcount {count}, free: {block in self._free}"
            )
        _require(len(self._free) + len(+held) == self.num_usable, "blocks outside the pool are free or held")
        for content_hash, block in self._block_of.items():
            _require(
                self._hash_of.get(block) == content_hash, f"block {block} is found under a hash that it does not have"
            )
        _require(len(self._block_of) == len(self._hash_of), "blocks have hashes under which they are not found")
        cached = [block in self._hash_of for block in self._free]
        _require(cached == sorted(cached), "a cached free block comes before one that nobody can find")
