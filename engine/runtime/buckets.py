"""Static shapes of the executables: few and geometric, so that all of them can be compiled ahead.

A step with n tokens of s sequences runs in the smallest bucket with `num_tokens >= n` and `num_seqs >= s`. There are
three kinds: decode buckets, one token per sequence (t, t), mixed buckets, where few (`small`) or all sequences share t
tokens, and verify buckets, where each of s sequences has a token and k drafts at most (s * (k + 1), s), all with
logits. There are verify buckets of few k: many drafts pay for one sequence, few of them for several. No jax here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SMALL_MIXED_SEQS = 8  # a lone prompt should not pay for the logits of every row
SMALL_MIXED_TOKENS = 256  # beyond this the logits of every row are lost in the rest
MOST_VERIFIED_SEQS = 64  # a step of more sequences is never short of work for the device: drafts only cost there
FEWEST_VERIFIED_ROWS = 4  # of a sequence: to halve fewer rows saves little time and costs executables


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one step executable, padding included.

    Attributes:
        num_tokens, num_seqs: of the step.
        num_logits: rows of logits of each sequence: its last token's, and those of as many drafts.
    """

    num_tokens: int
    num_seqs: int
    num_logits: int = 1

    @property
    def num_logit_rows(self) -> int:
        """Rows of logits in all."""
        return self.num_seqs * self.num_logits


def geometric(low: int, high: int) -> list[int]:
    """Powers of two from `low` up to, and ending with, `high`."""
    sizes, size = [], low
    while size < high:
        sizes.append(size)
        size *= 2
    return [*sizes, high]


@dataclass(frozen=True)
class BucketTable:
    """All buckets of an engine, and the choice among them.

    Attributes:
        max_num_tokens, max_num_seqs: of a step.
        num_drafts: most drafts of a sequence in a step.
    """

    max_num_tokens: int
    max_num_seqs: int
    num_drafts: int = 0

    @property
    def seq_sizes(self) -> list[int]:
        """Sequence counts that have executables, ascending."""
        return geometric(1, self.max_num_seqs)

    @property
    def token_sizes(self) -> list[int]:
        """Token counts of mixed buckets, ascending."""
        return geometric(min(16, self.max_num_tokens), self.max_num_tokens)

    @property
    def draft_sizes(self) -> list[int]:
        """Most drafts of a sequence that have verify buckets, ascending: rows halve as long as a few are left."""
        sizes, rows = [], self.num_drafts + 1
        while rows > 1 and (not sizes or rows >= FEWEST_VERIFIED_ROWS):
            sizes.append(rows - 1)
            rows //= 2
        return sizes[::-1]

    def all(self) -> list[Bucket]:
        """Every bucket, those first that a first request meets."""
        small = min(SMALL_MIXED_SEQS, self.max_num_seqs)
        decode = [Bucket(s, s) for s in self.seq_sizes]
        mixed = [
            Bucket(t, s)
            for t in self.token_sizes
            for s in ({small, self.max_num_seqs} if t <= SMALL_MIXED_TOKENS else {self.max_num_seqs})
            if s <= t
        ]
        return list(dict.fromkeys([*decode, *self.verify(), *sorted(mixed)]))

    def verify(self) -> list[Bucket]:
        """Buckets of steps with drafts, ascending."""
        return sorted(
            Bucket(seqs * (drafts + 1), seqs, drafts + 1)
            for drafts in self.draft_sizes
            for seqs in self.seq_sizes
            if seqs <= MOST_VERIFIED_SEQS and seqs * (drafts + 1) <= self.max_num_tokens
        )

    def choose(self, num_tokens: int, num_seqs: int, num_drafts: int = 0) -> Bucket:
        """The cheapest bucket that holds the step.

        Args:
            num_tokens, num_seqs: of the step.
            num_drafts: most drafts of a sequence in it.

        Raises:
            ValueError: the step exceeds the largest bucket; the scheduler's budget excludes that.
        """
        for bucket in self._verifying if num_drafts else self._others:
            if bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs and bucket.num_logits > num_drafts:
                return bucket
        raise ValueError(
            f"no bucket for {num_tokens} tokens of {num_seqs} sequences: "
            f"at most {self.max_num_tokens}, {self.max_num_seqs}"
        )

    def holding(self, num_tokens: int, num_seqs: int) -> list[Bucket]:
        """Every bucket without drafts that holds such a step, cheapest first."""
        return [b for b in self._others if b.num_tokens >= num_tokens and b.num_seqs >= num_seqs]

    # Made once: to make some thirty of them takes 70 us, which every step would pay.

    @cached_property
    def _verifying(self) -> list[Bucket]:
        return self.verify()

    @cached_property
    def _others(self) -> list[Bucket]:
        return sorted(bucket for bucket in self.all() if bucket.num_logits == 1)
