"""How long steps take: measured at the start for each shape, and corrected by what is seen since.

While no drafts are used nothing is seen of steps with drafts. Their time then drifts back to what it was at the start
beside that of a step without, within some thousand steps: so they are tried again, now and then, which costs less than
one percent.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.scheduling.plan import MOST_DRAFTS

WEIGHT = 0.1  # of a new observation
FORGET = 0.0005  # of what was seen of steps with drafts, at each step without


class StepTimes:
    """Seconds of a step by the number of sequences, with and without drafts.

    Args:
        plain, verify: sequences of a bucket -> seconds, as measured at the start.
        most_drafts: of a sequence in a step.
    """

    def __init__(self, plain: Mapping[int, float], verify: Mapping[int, float], most_drafts: int = MOST_DRAFTS) -> None:
        self._times = {False: dict(plain), True: dict(verify)}
        self._most_drafts = most_drafts
        self._longer = {size: verify[size] / plain[size] for size in verify if size in plain}  # at the start

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
        longer, verify = self._longer.get(bucket_seqs), self._times[True]
        if not drafts and longer is not None:
            # What made steps with drafts slow may have passed: without this they would never be tried again.
            verify[bucket_seqs] += FORGET * (longer * times[bucket_seqs] - verify[bucket_seqs])
