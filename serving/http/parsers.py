"""How answers are read: the border to `serving/parsing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import ConfigError
from serving.parsing.deltas import OutputParser
from serving.parsing.formats import TOOL_FORMATS, Choice, answer_format
from serving.parsing.reasoning import REASONING_STYLES


@dataclass(frozen=True)
class ParserRequest:
    """What decides how the answers to a request are read.

    Attributes:
        tools: those that the model may call, as the API has them; empty = none.
        tool_choice: "none", "auto", "required", or `{"type": "function", "function": {"name": …}}`.
        parallel: False = at most one call.
        constrained: a grammar of the request's own holds from the first token on.
    """

    tools: Sequence[dict[str, Any]] = ()
    tool_choice: Choice = "none"
    parallel: bool = True
    constrained: bool = False


class AnswerReader(Protocol):
    """How the answers to one request are read. `serving.parsing.formats.AnswerFormat` is one."""

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """What the engine must hold the answer to, so that it is the calls that were asked for."""
        ...

    @property
    def skip_special_tokens(self) -> bool:
        """False if the parser needs to see special tokens."""
        ...

    def parser(self, prompt_text: str = "") -> OutputParser:
        """A parser for one answer to a prompt, which may end inside the reasoning."""
        ...


class ParserFactory(Protocol):
    """Decides how answers are read."""

    def reader(self, request: ParserRequest) -> AnswerReader:
        """For the answers to one request."""
        ...


@dataclass(frozen=True)
class NamedParsers:
    """The parsers that the server was started with. None = calls are only found where they are enforced; reasoning is
    content."""

    tool_parser: str | None = None
    reasoning_parser: str | None = None

    def reader(self, request: ParserRequest) -> AnswerReader:
        """As `ParserFactory`."""
        return answer_format(
            tool_parser=self.tool_parser,
            reasoning_parser=self.reasoning_parser,
            tools=request.tools,
            tool_choice=request.tool_choice,
            parallel_tool_calls=request.parallel,
            constrained=request.constrained,
        )


def make_factory(tool_parser: str | None, reasoning_parser: str | None) -> ParserFactory:
    """The factory for these parsers.

    Raises:
        ConfigError: there is no such parser.
    """
    _check("tool_call_parser", tool_parser, TOOL_FORMATS)
    _check("reasoning_parser", reasoning_parser, REASONING_STYLES)
    return NamedParsers(tool_parser, reasoning_parser)


def _check(setting: str, name: str | None, known: Mapping[str, Any]) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"{setting} must be one of {', '.join(sorted(known))}; got {name!r}.")
