"""`Corpus`: outputs of sequences that have ended, the oldest out, and where a run of tokens stands in them.

A ring of tokens with hash chains, as Deflate's window: a table leads from the hash of a run of `RUN` tokens to the
latest place behind such a run, and each place to the one before it. Nothing is taken out of the chains when an output
goes: its tokens are overwritten, and a place counts only if the run really stands there.

    tokens    [ -1 | output 7 ...... | -1 | output 8 ... | -1 | (free) | -1 | output 3 ....... | -1 ]

Twelve bytes for a slot, and four for an entry of the table. An output is entered as a whole, by array operations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

RUN = 3
FIRST_SLOTS = 1 << 9
MOST_SLOTS = 1 << 20  # of one corpus, whatever the number of outputs
BORDER = -1
_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # odd, without a pattern
_WORD = 0xFFFFFFFF


class Corpus:
    """Outputs of the requests of one cache salt.

    Attributes:
        tokens: int32 view of the ring; `BORDER` between outputs and where nothing stands.
    """

    def __init__(self) -> None:
        self._outputs: deque[tuple[int, int]] = deque()  # (first slot, tokens), oldest first
        self._end = 0  # slot of the border behind the newest
        self._allocate(FIRST_SLOTS)

    @property
    def num_outputs(self) -> int:
        """Outputs that it holds."""
        return len(self._outputs)

    @property
    def num_slots(self) -> int:
        """Size of the ring."""
        return len(self._ring)

    def add(self, tokens: Sequence[int]) -> int:
        """Enter an output of more than `RUN` tokens; of one that is too long, the end.

        Returns:
            How many of the oldest had to go.
        """
        tokens = tokens[-(MOST_SLOTS // 2) :]
        num_dropped = 0
        while not self._has_room(len(tokens)):
            if self.num_slots < MOST_SLOTS:
                self._grow()
            else:
                self.drop_oldest()
                num_dropped += 1
        self._enter(np.asarray(tokens, np.int32))
        return num_dropped

    def drop_oldest(self) -> None:
        """Forget the oldest output."""
        start, length = self._outputs.popleft()
        self._ring[start : start + length] = BORDER

    def follow(self, places: list[int], tokens: Sequence[int]) -> list[int]:
        """Those places after which the tokens stand, each behind them."""
        ring = self.tokens
        for token in tokens:
            places = [place + 1 for place in places if ring[place] == token]
        return places

    def longest_matches(self, tokens: Sequence[int], longest: int, most: int) -> tuple[list[int], int]:
        """Where the most of a sequence's last tokens stand.

        Args:
            tokens: at least `RUN` of them.
            longest: tokens beyond which a match is not better.
            most: latest places of the last run that are looked at.

        Returns:
            The slots behind the longest match among them, latest first, and how many tokens match; [] and 0 if there is
            none.
        """
        ring, earlier = self.tokens, self._earlier_view
        third, second, first = tokens[-3], tokens[-2], tokens[-1]
        hashed = (third * _FACTORS[0] + second * _FACTORS[1] + first * _FACTORS[2]) & _WORD
        place, end = self._heads_view[hashed >> self._shift], len(tokens)
        best: list[int] = []
        best_matched = 0
        for _ in range(most):
            if not place:
                break
            if ring[place - 1] == first and ring[place - 2] == second and ring[place - 3] == third:
                matched = RUN
                # A border is no token, so that no match leaves its output; slot 0 always holds one.
                while matched < longest and matched < end and ring[place - matched - 1] == tokens[end - matched - 1]:
                    matched += 1
                if matched > best_matched:
                    best, best_matched = [place], matched
                elif matched == best_matched:
                    best.append(place)
            place = earlier[place]
        return best, best_matched

    def _allocate(self, num_slots: int) -> None:
        self._shift = 32 - (num_slots.bit_length() - 1)
        self._ring = np.full(num_slots, BORDER, np.int32)
        self._heads = np.zeros(num_slots, np.int32)  # hash -> slot behind the latest such run; 0 = none
        self._earlier = np.zeros(num_slots, np.int32)  # slot -> slot of the same hash before it
        # Single elements of a memoryview are read faster than those of an array.
        self.tokens, self._heads_view, self._earlier_view = map(memoryview, (self._ring, self._heads, self._earlier))

    def _has_room(self, length: int) -> bool:
        """Whether an output fits behind the newest, or else at the ring's beginning; moves there."""
        if not self._outputs:
            self._end = 0
        oldest = self._outputs[0][0] if self._outputs else 0
        if oldest <= self._end:  # the outputs stand in one piece
            if self._end + length + 2 <= self.num_slots:
                return True
            if length + 2 > oldest - 1:
                return False
            self._end = 0
            return True
        return self._end + length + 2 <= oldest - 1

    def _grow(self) -> None:
        outputs = [self._ring[start : start + length] for start, length in self._outputs]
        self._outputs.clear()
        self._end = 0
        self._allocate(2 * self.num_slots)
        for output in outputs:
            self._enter(output)

    def _enter(self, tokens: np.ndarray) -> None:
        start, length = self._end + 1, len(tokens)
        self._ring[start : start + length] = tokens
        self._end = start + length
        self._ring[self._end] = BORDER
        self._outputs.append((start, length))
        wide = tokens.astype(np.int64)
        hashed = (wide[:-3] * _FACTORS[0] + wide[1:-2] * _FACTORS[1] + wide[2:-1] * _FACTORS[2]) & _WORD
        slots = hashed >> self._shift
        places = np.arange(start + RUN, start + length, dtype=np.int32)  # something follows each
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        again = ordered[1:] == ordered[:-1]
        before = self._heads[slots]
        before[order[1:][again]] = places[order[:-1][again]]
        self._earlier[places] = before
        self._heads[ordered] = places[order]  # the last of equals stays
