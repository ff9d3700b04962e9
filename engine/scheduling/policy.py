"""In which order sequences are served: a sort key per policy, and a queue that keeps that order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from engine.requests.sequence import Sequence

OrderKey = Callable[[Sequence], tuple[int, int]]


def _fcfs(sequence: Sequence) -> tuple[int, int]:
    return (0, sequence.arrival)


def _priority(sequence: Sequence) -> tuple[int, int]:
    return (sequence.request.priority, sequence.arrival)


ORDER_KEYS: dict[str, OrderKey] = {"fcfs": _fcfs, "priority": _priority}


class SequenceQueue:
    """Sequences in the order of a policy; the first is served first, the last is preempted first.

    Keys are unique (`arrival` is), so a sequence is found by bisection. A preempted sequence that comes back finds
    itself before all that arrived after it: no "front of the queue" is needed.
    """

    def __init__(self, key: OrderKey) -> None:
        self._key = key
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Sequence:
        return self._items[index]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in its place."""
        insort(self._items, sequence, key=self._key)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands.

        Raises:
            ValueError: it is not in the queue.
        """
        index = bisect_left(self._items, self._key(sequence), key=self._key)
        if index == len(self._items) or self._items[index] is not sequence:
            raise ValueError(
                f"sequence {sequence.index} of request {sequence.request.request_id!r} is not in the queue"
            )
        del self._items[index]

    def check_invariants(self) -> None:
        """Prove the order.

        Raises:
            AssertionError: two neighbours are out of order or equal.
        """
        keys = [self._key(sequence) for sequence in self._items]
        if any(left >= right for left, right in zip(keys, keys[1:], strict=False)):
            raise AssertionError(f"queue is out of order: {keys}")
