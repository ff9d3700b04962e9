"""`PromptPace`: how much of a prompt a step may compute while streams decode, so that none of them waits long.

A stream gets its next token when the step ends, so the time between two tokens is that of a step, and a step takes as
long as its shape does, however full it is. Each shape's time is learned while serving. Of the shapes that keep the
target the largest is taken; what the streams leave free of it goes to prompts.

    shape      [ streams, one token each | prompts .................. ]
    seconds    learned; of a larger shape than any seen: as the last two shapes go on

Nothing is known at first: prompts then start with the smallest shape that holds a chunk beside the streams, and each
larger one is tried when the times of those before it promise that it keeps the target. The least chunk is given always,
also where no shape keeps the target: a prompt never starves. No jax here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from engine.requests.sequence import Sequence

NO_LIMIT = 1 << 30
LEAST_CHUNK = 16  # prompt tokens in a step, at the least
SLOWER, FASTER = 0.5, 0.1  # weight of an observation: a stream notices at once what is slower
MOST_JUMP = 3.0  # a pause of the machine is not believed to be longer than so many times what is known
FORGET = 0.002  # what made a shape too slow may have passed: it is tried again after some hundred steps


class PromptPace:
    """Learns the times of shapes, and gives the tokens that a step may have.

    Args:
        target_s: seconds between two tokens of a stream.
        sizes: tokens of the steps that have executables, in any order.
    """

    def __init__(self, target_s: float, sizes: Iterable[int]) -> None:
        self._target_s = target_s
        self._sizes = sorted(set(sizes))
        self._seconds: dict[int, float] = {}

    def observe(self, size: int, seconds: float) -> None:
        """A step in the shape of so many tokens took so long, from the end of the one before or from its start."""
        known = self._seconds.get(size)
        if known is None:
            self._seconds[size] = seconds
            return
        weight = SLOWER if seconds > known else FASTER
        self._seconds[size] = known + weight * (min(seconds, MOST_JUMP * known) - known)

    def seconds(self, size: int) -> float | None:
        """Expected of a step of so many tokens; None if no step was seen yet. Never less than of a smaller one."""
        seen = [each for each in self._sizes if each in self._seconds and each <= size]
        if not seen:
            return min((seconds for each, seconds in self._seconds.items() if each > size), default=None)
        slowest = max(self._seconds[each] for each in seen)
        if seen[-1] == size:
            return slowest
        larger = [self._seconds[each] for each in self._seconds if each > size]
        return max(slowest, min([self._beyond(seen, size), *larger]))

    def _beyond(self, seen: list[int], size: int) -> float:
        """As the last two sizes seen go on; of one alone, in proportion."""
        last, before = seen[-1], seen[-2] if len(seen) > 1 else 0
        slope = (self._seconds[last] - self._seconds.get(before, 0.0)) / (last - before)
        return self._seconds[last] + max(slope, 0.0) * (size - last)

    def allow(self, running: Iterable[Sequence], may_admit: bool) -> int:
        """Prompt tokens that the next step may have.

        Args:
            running: the sequences that own a row.
            may_admit: whether there are others that could begin.
        """
        reading = streams = 0
        for sequence in running:
            known = sequence.num_known
            if known - sequence.num_computed > 1:
                reading += 1
            elif known < sequence.most_known:
                streams += 1
        return self.prompt_tokens(streams) if reading or may_admit else NO_LIMIT

    def prompt_tokens(self, num_streams: int) -> int:
        """Prompt tokens beside so many streams, one token each; `NO_LIMIT` if there are none: nobody waits."""
        if num_streams == 0:
            return NO_LIMIT
        index = bisect_left(self._sizes, num_streams + LEAST_CHUNK)
        if index >= len(self._sizes):
            return LEAST_CHUNK
        for following in range(index + 1, len(self._sizes)):
            size = self._sizes[following]
            expected = self.seconds(size)
            if expected is None or expected > self._target_s:
                self._reconsider(size)
                break
            index = following
        return self._sizes[index] - num_streams

    def _reconsider(self, size: int) -> None:
        """A size was found too slow. Let what was seen of it fade, towards what smaller ones promise."""
        known, seen = self._seconds.get(size), [each for each in self._sizes if each < size and each in self._seconds]
        if known is not None and seen:
            promised = self._beyond(seen, size)
            self._seconds[size] = known + FORGET * min(promised - known, 0.0)
