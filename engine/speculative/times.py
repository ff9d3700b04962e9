"""How long steps take: measured at the start for each shape, and corrected by what is seen since.

While a shape is not used nothing is seen of it. Its time then drifts back to what it was at the start beside those that
are used, within some thousand steps: so it is tried again, now and then, which costs less than one percent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

WEIGHT = 0.1  # of a new observation
FORGET = 0.0005  # of what was seen of other shapes of as many sequences, at each step


class Choice(NamedTuple):
    """How many drafts pay most.

    Attributes:
        num_drafts: most of a sequence in the step.
        gain: tokens per second with them, over those without.
    """

    num_drafts: int
    gain: float


class StepTimes:
    """Seconds of a step by the number of sequences and by the most drafts that each of them may have.

    Args:
        plain: sequences of a bucket -> seconds without drafts, as measured at the start.
        verify: likewise with drafts, for each most number of them that there are buckets for.
    """

    def __init__(self, plain: Mapping[int, float], verify: Mapping[int, Mapping[int, float]]) -> None:
        self._times = {0: dict(plain), **{drafts: dict(times) for drafts, times in sorted(verify.items())}}
        self._at_start = {drafts: dict(times) for drafts, times in self._times.items()}

    def seconds(self, num_seqs: int, num_drafts: int = 0) -> float | None:
        """Of a step with so many sequences; None if there is no shape for it."""
        times = self._times[num_drafts]
        sizes = [size for size in times if size >= num_seqs]
        return times[min(sizes)] if sizes else None

    def best(self, num_seqs: int, expected: Callable[[int], float]) -> Choice | None:
        """The number of drafts that gives most tokens per second; None if no shape with drafts has room.

        Args:
            num_seqs: of the step.
            expected: right drafts of all of them together, if each has at most so many.
        """
        plain, found = self.seconds(num_seqs), None
        if plain is None:
            return None
        for num_drafts in self._times:
            seconds = self.seconds(num_seqs, num_drafts)
            if num_drafts == 0 or seconds is None:
                continue
            gain = (num_seqs + expected(num_drafts)) / num_seqs * plain / seconds
            if found is None or gain > found.gain:
                found = Choice(num_drafts, gain)
        return found

    def can_pay(self, num_seqs: int, least_gain: float) -> bool:
        """Whether so much is gained by steps of some shape if all drafts of so many sequences are right."""
        best = self.best(num_seqs, lambda num_drafts: float(num_seqs * num_drafts))
        return best is not None and best.gain > least_gain

    def observe(self, bucket_seqs: int, seconds: float, num_drafts: int = 0) -> None:
        """A step ran in the bucket of so many sequences and drafts. Pauses of the machine are not believed."""
        known = self._times.get(num_drafts, {}).get(bucket_seqs)
        if known is None:
            return  # a bucket that drafts are never thought of in
        now = self._times[num_drafts][bucket_seqs] = known + WEIGHT * (min(seconds, 3.0 * known) - known)
        slower = now / self._at_start[num_drafts][bucket_seqs]
        for other, times in self._times.items():
            if other != num_drafts and bucket_seqs in times:
                # What made these steps slow may have passed: without this they would never be tried again.
                times[bucket_seqs] += FORGET * (slower * self._at_start[other][bucket_seqs] - times[bucket_seqs])
