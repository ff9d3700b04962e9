"""`AnySpeculator`: what the loop asks of whoever decides about drafts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.requests.sequence import Sequence


class AnySpeculator(Protocol):
    """Decides before each step whether drafts pay, and gives them to sequences."""

    def wakes(self, count: int) -> bool:
        """Whether drafts may pay at all with so many sequences."""
        ...

    def pays(self, sequences: list[Sequence]) -> int:
        """How many drafts of each the next step of these sequences, one token each, should verify at most; 0 = none."""
        ...

    def must_read(self, sequences: list[Sequence]) -> bool:
        """Whether the host must have read all tokens of these sequences before they get drafts."""
        ...

    def give(self, sequences: Iterable[Sequence], num_drafts: int) -> None:
        """Give drafts to sequences, at most so many to each."""
        ...

    def on_tokens(self, sequence: Sequence, tokens: list[int], num_drafts: int) -> None:
        """A sequence got tokens, by a step that verified so many drafts of it. It has not ended."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        ...

    def observe_time(self, num_tokens: int, num_seqs: int, seconds: float, num_drafts: int) -> None:
        """A step took so long in the bucket of so many tokens, sequences and drafts of each, alone on the device."""
        ...
