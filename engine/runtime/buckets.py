"""Static shapes of the executables: few and geometric, so that all of them can be compiled ahead.

A step with n tokens of s sequences runs in the smallest bucket with `num_tokens >= n` and `num_seqs >= s`. There are
three kinds: decode buckets, one token per sequence (t, t), mixed buckets, where few (`small`) or all sequences share t
tokens, and verify buckets, where each of s sequences has a token and k drafts (s * (k + 1), s), all with logits. No jax
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SMALL_MIXED_SEQS = 8  # a lone prompt should not pay for the logits of every row
SMALL_MIXED_TOKENS = 256  # beyond this the logits of every row are lost in the rest
MOST_VERIFIED_SEQS = 64  # a step of more sequences is never short of work for the device: drafts only cost there


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
        if self.num_drafts == 0:
            return []
        rows = self.num_drafts + 1
        sizes = [s for s in self.seq_sizes if s <= MOST_VERIFIED_SEQS and s * rows <= self.max_num_tokens]
        return [Bucket(s * rows, s, rows) for s in sizes]

    def choose(self, num_tokens: int, num_seqs: int, has_drafts: bool = False) -> Bucket:
        """The cheapest bucket that holds the step.

        Raises:
            ValueError: the step exceeds the largest bucket; the scheduler's budget excludes that.
        """
        for bucket in self._verifying if has_drafts else self._others:
            if bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs:
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
        return sorted(self.verify())

    @cached_property
    def _others(self) -> list[Bucket]:
        return sorted(bucket for bucket in self.all() if bucket.num_logits == 1)
