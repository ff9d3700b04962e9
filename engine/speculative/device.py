"""`DeviceSpeculator`: decides when drafts that the device makes itself pay.

Nothing is known of such guesses but by verifying them. So rates begin hopeful, later with what other sequences had, and
while drafts do not pay they are tried again in one step of some hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.requests.sequence import Sequence
from engine.scheduling.plan import FROM_DRAFT
from engine.speculative.acceptance import AcceptanceRate
from engine.speculative.speculator import LEAST_GAIN
from engine.speculative.times import StepTimes

HOPE = 0.8  # rate of drafts of which nothing is known yet
TRY_AGAIN = 400  # steps without drafts; one that takes three times as long costs half a percent


class DeviceSpeculator:
    """An `AnySpeculator`.

    Args:
        num_drafts: most of a sequence in a step.
        times: of steps; None = draft always.
        most_seqs: sequences of the largest step that may have drafts.
        lags: whether drafts of a sequence need all its tokens on the host first.
        on_end: told of sequences that have ended.
    """

    def __init__(
        self,
        num_drafts: int,
        times: StepTimes | None,
        most_seqs: int,
        lags: Callable[[Sequence], bool],
        on_end: Callable[[Sequence], None],
    ) -> None:
        self._num_drafts = num_drafts
        self._times, self._most_seqs, self._lags, self._on_end = times, most_seqs, lags, on_end
        self._usual = AcceptanceRate(HOPE)
        self._rates: dict[Sequence, AcceptanceRate] = {}
        self._num_without = 0

    def wakes(self, count: int) -> bool:
        """See `AnySpeculator`."""
        return count <= self._most_seqs and (self._times is None or self._times.can_pay(count, LEAST_GAIN))

    def pays(self, sequences: list[Sequence]) -> int:
        """See `AnySpeculator`."""
        count, times = len(sequences), self._times
        if not self.wakes(count):
            return 0
        if times is None:
            return self._num_drafts
        usual = self._usual
        rates = [self._rates.get(sequence, usual) for sequence in sequences]
        best = times.best(count, lambda most: sum(rate.expected(most) for rate in rates))
        if best is not None and (best.gain > LEAST_GAIN or self._num_without >= TRY_AGAIN):
            self._num_without = 0
            return best.num_drafts
        self._num_without += 1
        return 0

    def must_read(self, sequences: list[Sequence]) -> bool:
        """See `AnySpeculator`."""
        return any(self._lags(sequence) for sequence in sequences)

    def give(self, sequences: Iterable[Sequence], num_drafts: int) -> None:
        """See `AnySpeculator`."""
        for sequence in sequences:
            sequence.draft_token_ids = (FROM_DRAFT,) * num_drafts

    def on_tokens(self, sequence: Sequence, tokens: list[int], num_drafts: int) -> None:
        """See `AnySpeculator`."""
        if num_drafts == 0:
            return
        rate = self._rates.get(sequence)
        if rate is None:
            rate = self._rates[sequence] = AcceptanceRate(self._usual.value)
        rate.observe(len(tokens) - 1, num_drafts)
        self._usual.observe(len(tokens) - 1, num_drafts)

    def forget(self, sequence: Sequence) -> None:
        """See `AnySpeculator`."""
        self._rates.pop(sequence, None)
        self._on_end(sequence)

    def observe_time(self, num_tokens: int, num_seqs: int, seconds: float, num_drafts: int) -> None:
        """See `AnySpeculator`."""
        if self._times is not None and (num_drafts or num_tokens == num_seqs):
            self._times.observe(num_seqs, seconds, num_drafts)
