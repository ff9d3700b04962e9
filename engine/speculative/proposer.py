"""`Proposer`: what makes guesses of a sequence's next tokens."""

from __future__ import annotations

from typing import Protocol

from engine.requests.sequence import Sequence


class Proposer(Protocol):
    """Guesses on the host, from tokens that it has read."""

    def extend(self, sequence: Sequence) -> None:
        """Take note of the tokens that a sequence got since the last call, or of its prompt at the first."""
        ...

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """Guesses of the tokens that follow all that `extend` has seen; () if there is none."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        ...
