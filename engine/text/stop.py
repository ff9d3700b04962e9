"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """Where a stop string is: `text[start:end] == stop`."""

    stop: str
    start: int
    end: int


def find_stop(text: str, num_seen: int, stops: Sequence[str]) -> StopMatch | None:
    """The stop string that completes first after the first `num_seen` characters.

    A match may begin among the characters seen before, but must end after them. Of several that end with the same
    character the longest counts, so that the result depends neither on the order of `stops` nor on how the text came
    in pieces.

    Args:
        text: the last characters seen (at least `longest stop - 1` of them, if there are so many), then the new ones.
        num_seen: how many of `text` were searched before, or must not complete a match.
        stops: non-empty strings.
    """
    best: StopMatch | None = None
    for stop in stops:
        start = text.find(stop, max(0, num_seen - len(stop) + 1))
        if start < 0:
            continue
        end = start + len(stop)
        if best is None or end < best.end or (end == best.end and start < best.start):
            best = StopMatch(stop, start, end)
    return best
