"""What a parser returns, and what a parser is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ContentDelta:
    """More of the visible answer."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of one tool call.

    Attributes:
        index: which call of the answer, from 0.
        id, name: set in the first delta of a call, None in those that follow.
        arguments: more of the JSON text of the arguments.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


class OutputParser(Protocol):
    """Parses one answer. Holds what is not certain yet."""

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text; return what became certain."""
        ...

    def finish(self) -> list[Delta]:
        """The answer is over: return what was held back."""
        ...


class PlainParser:
    """All text is content."""

    def feed(self, text: str) -> list[Delta]:
        """As `OutputParser`."""
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        """As `OutputParser`."""
        return []
