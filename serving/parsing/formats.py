"""`AnswerFormat`: how the answers to one request are read, and what that asks of the engine.

Reasoning is split off first, the rest is searched for calls. Names of the parsers are those of vLLM where they mean the
same format.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serving.parsing.deltas import OutputParser, PlainParser
from serving.parsing.emitter import Emitter, NewId
from serving.parsing.enforce import schema_of_named, schema_of_required
from serving.parsing.reasoning import REASONING_STYLES, ReasoningParser
from serving.parsing.tools.forced import NamedCallParser, RequiredCallsParser
from serving.parsing.tools.hermes import HermesParser
from serving.parsing.tools.llama3_json import Llama3JsonParser
from serving.parsing.tools.mistral import MistralParser
from serving.parsing.tools.pythonic import PythonicParser

Choice = Literal["none", "auto", "required"] | Mapping[str, Any]

_ID_LETTERS = string.ascii_letters + string.digits


def new_call_id() -> str:
    """The id of a call as OpenAI's: `call_` and 24 letters or digits."""
    return "call_" + "".join(secrets.choice(_ID_LETTERS) for _ in range(24))


def new_mistral_id() -> str:
    """The id of a call as Mistral's chat templates want it: 9 letters or digits."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


@dataclass(frozen=True)
class ToolFormat:
    """A format of tool calls.

    Attributes:
        parser: makes a parser from an emitter and the names of the tools.
        needs_special_tokens: the marks are special tokens in some models; these have no text unless
            `skip_special_tokens` is off.
        new_id: makes the ids of calls.
    """

    parser: Callable[[Emitter, frozenset[str]], OutputParser]
    needs_special_tokens: bool
    new_id: NewId = new_call_id


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat(HermesParser, needs_special_tokens=True),
    "llama3_json": ToolFormat(Llama3JsonParser, needs_special_tokens=True),
    "mistral": ToolFormat(MistralParser, needs_special_tokens=True, new_id=new_mistral_id),
    "pythonic": ToolFormat(PythonicParser, needs_special_tokens=False),
}


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers to a request are read.

    Attributes:
        json_schema: what the engine must hold the answer to (`StructuredOutputsParams(json=…)`); None = nothing.
        skip_special_tokens: False if the parsers need to see special tokens; True = as the request says.
        reads_calls: True if calls are looked for.
        tool_format: of the calls; None = as enforced, or none.
        reasoning: key of REASONING_STYLES, or None.
        names: of the tools.
        named: the function that must be called, or None.
        most_calls: calls after this many are left out; None = all are kept.
        new_id: makes the ids of calls.
    """

    json_schema: dict[str, Any] | None = None
    skip_special_tokens: bool = True
    reads_calls: bool = False
    tool_format: ToolFormat | None = None
    reasoning: str | None = None
    names: frozenset[str] = frozenset()
    named: str | None = None
    most_calls: int | None = None
    new_id: NewId = new_call_id

    def parser(self, prompt_text: str = "") -> OutputParser:
        """A parser for one answer.

        Args:
            prompt_text: the prompt, or its end: a template may open or close the reasoning there.
        """
        answer = self._answer_parser()
        style = REASONING_STYLES[self.reasoning] if self.reasoning else None
        return answer if style is None else ReasoningParser(style, prompt_text, answer)

    def _answer_parser(self) -> OutputParser:
        emitter = Emitter(self.new_id, self.most_calls)
        if not self.reads_calls:
            return PlainParser()
        if self.named is not None:
            return NamedCallParser(emitter, self.named)
        if self.tool_format is not None:
            return self.tool_format.parser(emitter, self.names)
        return RequiredCallsParser(emitter, self.names)


def answer_format(
    *,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: Choice | None = None,
    parallel_tool_calls: bool = True,
    constrained: bool = False,
) -> AnswerFormat:
    """Decide how the answers to a request are read.

    Args:
        tool_parser: key of TOOL_FORMATS: what the model writes of itself; None = calls are only found if enforced.
        reasoning_parser: key of REASONING_STYLES, or None.
        tools: OpenAI's: `{"type": "function", "function": {"name": …, "parameters": …}}`.
        tool_choice: OpenAI's; None = "auto" if there are tools.
        parallel_tool_calls: False = at most one call.
        constrained: a grammar of the request's own holds from the first token on: there is no reasoning then, and no
            call.

    Raises:
        KeyError: there is no such parser, or the tool_choice names a function that is not among the tools.
    """
    style = REASONING_STYLES[reasoning_parser] if reasoning_parser else None
    wanted = TOOL_FORMATS[tool_parser] if tool_parser else None
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    new_id = wanted.new_id if wanted else new_call_id
    if functions and not constrained:
        if isinstance(tool_choice, Mapping):
            named = tool_choice["function"]["name"]
            schema = schema_of_named(functions[named])
            return AnswerFormat(schema, reads_calls=True, names=frozenset(functions), named=named, new_id=new_id)
        if tool_choice == "required":
            schema = schema_of_required(list(functions.values()), parallel=parallel_tool_calls)
            return AnswerFormat(schema, reads_calls=True, names=frozenset(functions), new_id=new_id)
    reasoning = None if constrained or style is None else reasoning_parser
    needs = reasoning is not None and style is not None and style.needs_special_tokens
    if wanted is None or not functions or constrained or tool_choice == "none":
        return AnswerFormat(skip_special_tokens=not needs, reasoning=reasoning)
    return AnswerFormat(
        skip_special_tokens=not (needs or wanted.needs_special_tokens),
        reads_calls=True,
        tool_format=wanted,
        reasoning=reasoning,
        names=frozenset(functions),
        most_calls=None if parallel_tool_calls else 1,
        new_id=new_id,
    )
