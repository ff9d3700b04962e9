"""`History`: the tokens of one sequence, and where its last ones stood before.

    tokens   … the cat sat on the mat … and the cat
                       ^ place: index behind an earlier occurrence of the last `size` tokens

Each place leads to the one before it that follows the same run of `size` tokens: chains in one list, and a dict with
the latest place of each run. So a token costs one look-up and one entry, whether or not anybody asks what follows.
"""

from __future__ import annotations

from collections.abc import Sequence


class History:
    """Grows by tokens.

    Args:
        size: tokens of a run; what matches less is no match.

    Attributes:
        tokens: all of them.
        latest: the latest place of the last run before the end; 0 if there is none.
    """

    __slots__ = ("_earlier", "_latest_of", "_size", "latest", "tokens")

    def __init__(self, size: int) -> None:
        self.tokens: list[int] = []
        self.latest = 0
        self._size = size
        self._earlier: list[int] = [0] * size  # [place] -> the place before it of the same run; 0 = none
        self._latest_of: dict[tuple[int, ...] | int, int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens."""
        known, size, latest_of, earlier = self.tokens, self._size, self._latest_of, self._earlier
        known += tokens
        latest = self.latest
        if len(tokens) == 1 and len(known) == len(earlier):  # as in most steps; the loop below would do the same
            end = len(known)
            run = tokens[0] if size == 1 else tuple(known[end - size :])
            self.latest = latest_of.get(run, 0)
            latest_of[run] = end
            earlier.append(self.latest)
            return
        for end in range(len(earlier), len(known) + 1):  # those before complete no run
            run = known[end - 1] if size == 1 else tuple(known[end - size : end])
            latest = latest_of.get(run, 0)
            latest_of[run] = end
            earlier.append(latest)
        self.latest = latest

    def longest_matches(self, longest: int, most: int) -> tuple[list[int], int]:
        """Where the most of the last tokens stood before.

        Args:
            longest: tokens beyond which a match is not better.
            most: latest places of the last run that are looked at.

        Returns:
            The places with the longest match among them, latest first, and how many tokens match; [] and 0 if the last
            run is new.
        """
        place = self.latest
        if not place:
            return [], 0
        tokens, earlier, size = self.tokens, self._earlier, self._size
        best: list[int] = []
        best_matched, end = 0, len(tokens)
        for _ in range(most):
            matched = size
            while matched < longest and matched < place and tokens[place - matched - 1] == tokens[end - matched - 1]:
                matched += 1
            if matched > best_matched:
                best, best_matched = [place], matched
            elif matched == best_matched:
                best.append(place)
            place = earlier[place]
            if not place:
                break
        return best, best_matched


def continued(tokens: list[int], place: int, count: int) -> tuple[int, ...]:
    """The `count` tokens from `place` on. A match that reaches the end goes on by itself: loops are foreseen."""
    found = tokens[place : place + count]
    if len(found) < count:
        period = len(tokens) - place
        while len(found) < count:
            found.append(found[-period])
    return tuple(found)
