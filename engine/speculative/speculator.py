"""`Speculator`: decides before each step whether drafts pay, and gives them to sequences.

A step with drafts of S sequences takes longer than one without and gives more tokens. Drafts are used where

    (S + expected right drafts) / time with drafts  >  S / time without

by the measured times of both shapes and by how often each sequence's guesses were right. Of the shapes with drafts,
some for many of each sequence and some for few, the one is taken that gives most. The rates are known without drafting,
too: the first guess after each token is compared with the token that comes. So a sequence that starts to copy is
noticed, and one whose guesses fail costs nothing but the guess. With so many sequences that even right drafts would not
pay, nobody guesses: what was missed is read when they are fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.requests.sequence import Sequence
from engine.runtime.buckets import MOST_VERIFIED_SEQS
from engine.scheduling.plan import MOST_DRAFTS
from engine.speculative.acceptance import AcceptanceRate
from engine.speculative.proposer import Proposer
from engine.speculative.times import StepTimes

LEAST_GAIN = 1.02  # what is gained must be more than the noise of the times


@dataclass
class _Guess:
    """What is known of one sequence's guesses."""

    rate: AcceptanceRate = field(default_factory=AcceptanceRate)
    drafts: tuple[int, ...] = ()  # after all tokens that the host has read


class Speculator:
    """Owns the guesses of live sequences.

    Args:
        proposer: makes them.
        times: of steps; None = draft wherever there is a guess.
        most_seqs: sequences of the largest step that may have drafts, with or without times.
    """

    def __init__(self, proposer: Proposer, times: StepTimes | None, most_seqs: int = MOST_VERIFIED_SEQS) -> None:
        self._proposer, self._times, self._most_seqs = proposer, times, most_seqs
        self._guesses: dict[Sequence, _Guess] = {}
        self._asleep = False

    def on_tokens(self, sequence: Sequence, tokens: list[int], num_drafts: int) -> None:
        """A sequence got tokens, by a step that verified so many drafts of it. It has not ended."""
        if self._asleep:
            return
        guess = self._guesses.get(sequence)
        if guess is None:
            guess = self._guesses[sequence] = _Guess()
        elif num_drafts:
            guess.rate.observe(len(tokens) - 1, num_drafts)
        elif guess.drafts:
            guess.rate.observe(int(guess.drafts[0] == tokens[0]), 1)
        self._proposer.extend(sequence)
        guess.drafts = self._proposer.propose(sequence)

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._guesses.pop(sequence, None)
        self._proposer.forget(sequence)

    def wakes(self, count: int) -> bool:
        """Whether drafts may pay at all with so many sequences. If not, none are made until it is asked again."""
        asleep = count > self._most_seqs
        if not asleep and self._times is not None:
            asleep = not self._times.can_pay(count, LEAST_GAIN)
        if asleep and not self._asleep:
            for guess in self._guesses.values():
                guess.drafts = ()  # they would be out of date when it wakes
        self._asleep = asleep
        return not asleep

    def pays(self, sequences: list[Sequence]) -> int:
        """See `AnySpeculator`.

        With a step in flight the guesses are those before its tokens; they are taken as typical of those after.
        """
        count, times = len(sequences), self._times
        if not self.wakes(count):
            return 0
        found = [self._guesses.get(sequence) for sequence in sequences]
        known = [(guess.rate, len(guess.drafts)) for guess in found if guess is not None and guess.drafts]
        if not known:
            return 0
        if times is None:
            return MOST_DRAFTS
        best = times.best(count, lambda most: sum(rate.expected(min(most, length)) for rate, length in known))
        return best.num_drafts if best is not None and best.gain > LEAST_GAIN else 0

    def must_read(self, sequences: list[Sequence]) -> bool:
        """See `AnySpeculator`: the host guesses from what it has read."""
        del sequences
        return True

    def give(self, sequences: Iterable[Sequence], num_drafts: int = MOST_DRAFTS) -> None:
        """Give their guesses to sequences whose tokens the host has all read."""
        for sequence in sequences:
            guess = self._guesses.get(sequence)
            if guess is not None:
                sequence.draft_token_ids = guess.drafts[:num_drafts]

    def observe_time(self, num_tokens: int, num_seqs: int, seconds: float, num_drafts: int) -> None:
        """See `AnySpeculator`."""
        if self._times is not None and (num_drafts or num_tokens == num_seqs):
            self._times.observe(num_seqs, seconds, num_drafts)
