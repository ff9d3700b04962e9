"""How often the guesses of a sequence are right: a rate that forgets."""

from __future__ import annotations

DECAY = 0.9  # of what was seen, at each new observation: some ten of them count
PRIOR_TRIALS = 2.0  # that the first belief is worth
MOST_SURE = 0.99


class AcceptanceRate:
    """The chance that a draft is right, given that those before it were.

    A draft that is verified is a trial, up to and including the first that is wrong.

    Args:
        prior: what is believed before the first.
    """

    __slots__ = ("_right", "_trials")

    def __init__(self, prior: float = 0.5) -> None:
        self._right, self._trials = prior * PRIOR_TRIALS, PRIOR_TRIALS

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self._right / self._trials

    def observe(self, num_right: int, num_drafts: int) -> None:
        """`num_right` of `num_drafts` drafts were right."""
        trials = min(num_right + 1, num_drafts)
        self._right = DECAY * self._right + num_right
        self._trials = DECAY * self._trials + trials

    def expected(self, num_drafts: int) -> float:
        """Expected number of right drafts out of so many: rate + rate^2 + …"""
        rate = self._right / self._trials
        if rate > MOST_SURE:
            rate = MOST_SURE
        return rate * (1.0 - rate**num_drafts) / (1.0 - rate)
