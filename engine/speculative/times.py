"""How long steps take: measured at the start for each shape, and corrected by what is seen since."""

from __future__ import annotations

from collections.abc import Mapping

from engine.scheduling.plan import MOST_DRAFTS

WEIGHT = 0.1  # of a new observation


class StepTimes:
    """Seconds of a step by the number of sequences, with and without drafts.

    Args:
        plain, verify: sequences of a bucket -> seconds, as measured at the start.
        most_drafts: of a sequence in a step.
    """

    def __init__(self, plain: Mapping[int, float], verify: Mapping[int, float], most_drafts: int = MOST_DRAFTS) -> None:
        self._times = {False: dict(plain), True: dict(verify)}
        self._most_drafts = most_drafts

    def can_pay(self, num_seqs: int, least_gain: float) -> bool:
        """Whether so much is gained if all drafts of so many sequences, for which there is a shape, are right."""
        longer = self.seconds(num_seqs, drafts=True) / self.seconds(num_seqs, drafts=False)
        return (1 + self._most_drafts) / longer > least_gain

    def seconds(self, num_seqs: int, *, drafts: bool) -> float:
        """Of a step with so many sequences."""
        times = self._times[drafts]
        return times[min(size for size in times if size >= num_seqs)]

    def observe(self, bucket_seqs: int, seconds: float, *, drafts: bool) -> None:
        """A step ran in the bucket of so many sequences. Pauses of the machine are not believed."""
        times = self._times[drafts]
        known = times.get(bucket_seqs)
        if known is None:
            return  # a bucket that drafts are never thought of in
        times[bucket_seqs] = known + WEIGHT * (min(seconds, 3.0 * known) - known)
