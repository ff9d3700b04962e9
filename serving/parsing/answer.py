"""`ParsedAnswer`: what a reply that is not streamed shows, made from the same deltas as one that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serving.parsing.deltas import ContentDelta, Delta, OutputParser, ReasoningDelta


@dataclass(frozen=True)
class ToolCall:
    """One call: its id, the name of the function, and its arguments as JSON text, just as the model wrote them."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedAnswer:
    """A whole answer.

    Attributes:
        content: the visible text; None if there is none beside calls or reasoning.
        reasoning: None if there is none.
        tool_calls: in order.
    """

    content: str | None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


def collect(deltas: Iterable[Delta]) -> ParsedAnswer:
    """Put the deltas of one answer together."""
    content: list[str] = []
    reasoning: list[str] = []
    headers: list[tuple[str, str]] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content.append(delta.text)
        elif isinstance(delta, ReasoningDelta):
            reasoning.append(delta.text)
        else:
            if delta.id is not None and delta.name is not None:
                headers.append((delta.id, delta.name))
                arguments.append([])
            arguments[delta.index].append(delta.arguments)
    calls = tuple(ToolCall(i, name, "".join(parts)) for (i, name), parts in zip(headers, arguments, strict=True))
    text, thoughts = "".join(content), "".join(reasoning)
    return ParsedAnswer(text if text or not (thoughts or calls) else None, thoughts or None, calls)


def parse_answer(parser: OutputParser, text: str) -> ParsedAnswer:
    """Parse a whole answer at once."""
    return collect([*parser.feed(text), *parser.finish()])
