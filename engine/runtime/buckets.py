"""Static shapes of the executables: few and geometric, so that every one is compiled before the first request.

A step with n tokens of s sequences runs in the smallest bucket with `num_tokens >= n` and `num_seqs >= s`. There are
two kinds: decode buckets, one token per sequence (t, t), and mixed buckets, where few (`small`) or all sequences share
    t tokens. No jax here.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALL_MIXED_SEQS = 8  # a lone prompt should not pay for the logits of every row
SMALL_MIXED_TOKENS = 256  # beyond this the logits of every row are lost in the rest


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of one step executable: tokens and sequences, padding included."""

    num_tokens: int
    num_seqs: int


def geometric(low: int, high: int) -> list[int]:
    """Powers of two from `low` up to, and ending with, `high`."""
    sizes, size = [], low
    while size < high:
        sizes.append(size)
        size *= 2
    return [*sizes, high]


@dataclass(frozen=True)
class BucketTable:
    """All buckets of an engine, and the choice among them."""

    max_num_tokens: int
    max_num_seqs: int

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
        return list(dict.fromkeys([*decode, *sorted(mixed)]))

    def choose(self, num_tokens: int, num_seqs: int) -> Bucket:
        """The cheapest bucket that holds the step.

        Raises:
            ValueError: the step exceeds the largest bucket; the scheduler's budget excludes that.
        """
        fitting = [b for b in self.all() if b.num_tokens >= num_tokens and b.num_seqs >= num_seqs]
        if not fitting:
            raise ValueError(
                f"no bucket for {num_tokens} tokens of {num_seqs} sequences: "
                f"at most {self.max_num_tokens}, {self.max_num_seqs}"
            )
        return min(fitting)
