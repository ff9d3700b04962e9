"""From intervals to time per category that adds up to the wall time.

At every moment, the running instructions share the moment equally; loops count only where nothing inside them runs;
where nothing runs at all, the device waits (for the host, or for its own threads to wake).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.profiling.categories import FORWARD_MODULE, LOOPS, WAITING
from benchmarks.profiling.trace import Event


@dataclass(frozen=True)
class Interval:
    """Something of a category that ran from `start` to `stop`."""

    category: str
    start: float
    stop: float


@dataclass(frozen=True)
class Step:
    """One step of a trace: from the start of its forward pass to the start of the next, in nanoseconds."""

    start_ns: float
    stop_ns: float

    @property
    def length_ns(self) -> float:
        """Wall time."""
        return self.stop_ns - self.start_ns


def undisturbed_steps(events: Iterable[Event]) -> list[Step]:
    """The middle half of a trace's steps by wall time, so that a moment in which the machine did something else does
    not count. The first step is left out: it may have begun before the trace.

    Raises:
        ValueError: fewer than three forward passes.
    """
    starts: dict[int, float] = {}
    for event in events:
        if event.module == FORWARD_MODULE:
            starts[event.run] = min(event.start_ns, starts.get(event.run, event.start_ns))
    ordered = sorted(starts.values())[1:]
    steps = sorted((Step(*pair) for pair in pairwise(ordered)), key=lambda step: step.length_ns)
    if not steps:
        raise ValueError(f"the trace has {len(starts)} forward passes; 3 or more are needed.")
    edge = len(steps) // 4
    return steps[edge : len(steps) - edge]


def mean_step(intervals: Sequence[Interval], steps: Sequence[Step]) -> dict[str, float]:
    """Time of each category in an average step; the values sum to the steps' mean length."""
    total: dict[str, float] = defaultdict(float)
    for step in steps:
        inside = [i for i in intervals if i.start < step.stop_ns and i.stop > step.start_ns]
        for name, time in share_out(inside, step.start_ns, step.stop_ns).items():
            total[name] += time / len(steps)
    return dict(total)


def share_out(intervals: Sequence[Interval], start: float, stop: float) -> dict[str, float]:
    """Time of each category between `start` and `stop`, in the intervals' unit; the values sum to `stop - start`."""
    edges: list[tuple[float, int, str]] = []
    for interval in intervals:
        first, last = max(interval.start, start), min(interval.stop, stop)
        if first < last:
            edges += [(first, 1, interval.category), (last, -1, interval.category)]
    edges.sort()
    running: dict[str, int] = defaultdict(int)
    shares: dict[str, float] = defaultdict(float)
    now = start
    for moment, change, category in [*edges, (stop, 0, WAITING)]:
        if moment > now:
            _share_moment(shares, running, moment - now)
            now = moment
        running[category] += change
    return dict(shares)


def _share_moment(shares: dict[str, float], running: dict[str, int], length: float) -> None:
    workers = {category: count for category, count in running.items() if count and category != LOOPS}
    if workers:
        for category, count in workers.items():
            shares[category] += length * count / sum(workers.values())
    else:
        shares[LOOPS if running.get(LOOPS) else WAITING] += length
