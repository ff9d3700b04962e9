"""`KVAllocator`: gives the blocks of a pool to sequences, and keeps their block tables and hashes in step."""

from __future__ import annotations

from engine.requests.sequence import Sequence
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.prefix_hash import chain_hashes


class KVAllocator:
    """The one place where block tables change.

        tokens       [ . . . . | . . . . | . . . . | . .     ]    block_size 4
        block table  [  block  |  block  |  block  |  block  ]
                      <-- num_cached_blocks -->     ^ exclusive: written by this sequence only

    Blocks that the sequence still writes to are its own; a block is shared only when all of its tokens are planned.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size

    @property
    def capacity_tokens(self) -> int:
        """Most tokens whose KV the pool holds, if one sequence has it all."""
        return self.pool.num_usable * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def find_cached(self, sequence: Sequence, root: bytes) -> list[int]:
        """The longest chain of findable blocks with the sequence's known tokens. Nothing is held yet: see `place`.

        At most `num_known - 1` tokens, in whole blocks: at least one token must be computed to have something to sample
        from. All known tokens must be on the host.
        """
        limit = (sequence.num_known - 1) // self.block_size
        self._extend_hashes(sequence, root, limit)
        blocks: list[int] = []
        for content_hash in sequence.block_hashes[:limit]:
            block = self.pool.find(content_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def fits(self, sequence: Sequence, cached: list[int], num_promised: int) -> bool:
        """Whether all known tokens and the next one would fit in the free blocks, without those promised to others.

        Args:
            sequence: one that holds no blocks.
            cached: what `find_cached` gave for it.
            num_promised: free blocks that running sequences still need for their known tokens.
        """
        # A sequence as long as the whole pool has no next token: it ends there.
        num_tokens = min(sequence.num_known + 1, self.capacity_tokens)
        wanted = self.num_blocks(num_tokens) - len(cached) + self.pool.num_free_among(cached)
        return wanted <= self.pool.num_free - num_promised

    def place(self, sequence: Sequence, cached: list[int]) -> None:
        """Start the block table of a sequence with cached blocks: their tokens count as computed."""
        self.pool.share(cached)
        sequence.block_table = list(cached)
        sequence.num_cached_blocks = len(cached)
        sequence.num_computed = len(cached) * self.block_size

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold `num_tokens`. False, with nothing changed, if too few blocks are free."""
        table = sequence.block_table
        missing = self.num_blocks(num_tokens) - len(table)
        if missing > 0:
            if missing > self.pool.num_free:
                return False
            table += self.pool.allocate(missing)
        return True

    def num_missing(self, sequence: Sequence) -> int:
        """Blocks that a running sequence lacks for its known tokens."""
        return max(0, self.num_blocks(sequence.num_known) - len(sequence.block_table))

    def num_fixed_blocks(self, sequence: Sequence) -> int:
        """Leading blocks whose content is final: every token is planned or computed, and its value is on the host."""
        num_on_host = sequence.num_prompt_tokens + len(sequence.output_token_ids)
        return min(sequence.num_computed, num_on_host) // self.block_size

    def register_fixed(self, sequence: Sequence, root: bytes) -> None:
        """Make those blocks findable that became final since the last call.

        They are findable as soon as the step that fills them is *planned*. That is right, even for a sequence admitted
        in the very same step: in each layer all keys and values of the step are written before attention reads, and
        steps run on the device in the order in which they were planned.
        """
        limit = self.num_fixed_blocks(sequence)
        self._extend_hashes(sequence, root, limit)
        for index in range(sequence.num_cached_blocks, limit):
            self.pool.register(sequence.block_table[index], sequence.block_hashes[index])
        sequence.num_cached_blocks = max(sequence.num_cached_blocks, limit)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks away.

        Steps in flight may still read and write them. That harms nobody: whoever gets them next does so in a later
        step, and finds in them only what was final.
        """
        self.pool.release(sequence.block_table)
        sequence.block_table = []  # a new list: a plan's reader may hold the old one
        sequence.num_cached_blocks = 0
        sequence.num_sent_blocks = 0
        sequence.num_computed = 0

    def _extend_hashes(self, sequence: Sequence, root: bytes, limit: int) -> None:
        """Hash the first `limit` blocks, of which all tokens are on the host, as far as that is not done yet."""
        hashes = sequence.block_hashes
        if len(hashes) < limit:
            start, stop = len(hashes) * self.block_size, limit * self.block_size
            hashes += chain_hashes(hashes[-1] if hashes else root, sequence.token_ids(start, stop), self.block_size)
