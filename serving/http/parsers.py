"""Which parser reads an answer: the border to `serving/parsing`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import ConfigError
from serving.parsing.deltas import OutputParser, PlainParser


@dataclass(frozen=True)
class ParserRequest:
    """What a parser is made for.

    Attributes:
        tools: those that the model may call, as the API has them; empty = none.
        tool_choice: "none", "auto", "required", or the name of the function that must be called.
        prompt: text of the prompt; it may end inside the reasoning.
    """

    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str = "none"
    prompt: str = ""


class ParserFactory(Protocol):
    """Makes a parser per answer."""

    reads_tools: bool
    """True if it knows how the model calls tools."""

    def make(self, request: ParserRequest) -> OutputParser:
        """A parser for one answer."""
        ...


class PlainFactory:
    """Everything is content."""

    reads_tools = False

    def make(self, request: ParserRequest) -> OutputParser:
        """As `ParserFactory`."""
        return PlainParser()


def make_factory(tool_parser: str | None, reasoning_parser: str | None) -> ParserFactory:
    """The factory for these parsers.

    Raises:
        ConfigError: there is no such parser.
    """
    for flag, name in (("tool_call_parser", tool_parser), ("reasoning_parser", reasoning_parser)):
        if name is not None:
            raise ConfigError(f"{flag} {name!r} is not known; there are none.")
    return PlainFactory()
