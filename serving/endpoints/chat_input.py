"""What a chat request says → the text of a prompt, and what its answer must be."""

from __future__ import annotations

from typing import Any

from engine.errors import InvalidRequestError
from serving.http.context import ServerContext
from serving.http.parsers import ParserRequest
from serving.parsing.formats import Choice
from serving.protocol.chat import ChatRequest, NamedToolChoice


def check_chat(context: ServerContext, body: ChatRequest) -> None:
    """Check what pydantic cannot: fields that need or exclude each other, and what the server allows.

    Raises:
        InvalidRequestError: see there.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs may only be set when logprobs is true.", "top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other: set add_generation_prompt to false.",
            "continue_final_message",
        )
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    if both and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens differ; the first is the old name of the second.", "max_tokens"
        )
    trusts = context.settings.trust_request_chat_template
    if not trusts and (body.chat_template is not None or "chat_template" in (body.chat_template_kwargs or {})):
        raise InvalidRequestError(
            "chat_template in a request needs a server that was started with --trust-request-chat-template.",
            "chat_template",
        )
    _check_tools(context, body)


def _check_tools(context: ServerContext, body: ChatRequest) -> None:
    choice = body.tool_choice
    if body.tools is not None and not body.tools:
        raise InvalidRequestError("tools must not be empty: leave it out.", "tools")
    if not body.tools:
        if choice not in (None, "none"):
            raise InvalidRequestError("tool_choice needs tools.", "tool_choice")
        return
    names = [tool.function.name for tool in body.tools]
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise InvalidRequestError(f"tool_choice names {choice.function.name!r}, which is not in tools.", "tool_choice")
    if choice in (None, "auto") and not context.settings.enable_auto_tool_choice:
        raise InvalidRequestError(
            'tool_choice "auto" (also where tools come without tool_choice) needs a server that was started with '
            "--enable-auto-tool-choice and --tool-call-parser.",
            "tool_choice",
        )
    if _is_enforced(body) and body.structured() is not None:
        raise InvalidRequestError(
            "a tool_choice that forces a call excludes response_format and structured_outputs: the answer is the call.",
            "tool_choice",
        )


def _is_enforced(body: ChatRequest) -> bool:
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedToolChoice)


def _tool_choice_of(body: ChatRequest) -> Choice:
    if not body.tools:
        return "none"
    if isinstance(body.tool_choice, NamedToolChoice):
        return body.tool_choice.model_dump(exclude_none=True)
    return body.tool_choice or "auto"


def _tools_of(body: ChatRequest) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in body.tools or ()]


def chat_prompt(context: ServerContext, body: ChatRequest) -> str:
    """The conversation as text.

    Raises:
        InvalidRequestError: the template refuses it, or parts of it are not text.
    """
    variables: dict[str, Any] = {}
    if tools := _tools_of(body):
        variables["tools"] = tools
    if body.documents is not None:
        variables["documents"] = body.documents
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    variables |= body.chat_template_kwargs or {}
    template = variables.pop("chat_template", None)
    return context.renderer.render(
        [message.model_dump(exclude_none=True) for message in body.messages],
        add_generation_prompt=bool(variables.pop("add_generation_prompt", body.add_generation_prompt)),
        continue_final_message=bool(variables.pop("continue_final_message", body.continue_final_message)),
        template=body.chat_template if body.chat_template is not None else template,
        variables=variables,
    )


def parser_request(body: ChatRequest) -> ParserRequest:
    """What decides how the answers are read."""
    structured = body.structured()
    return ParserRequest(
        tools=_tools_of(body),
        tool_choice=_tool_choice_of(body),
        parallel=body.parallel_tool_calls is not False,
        # A structural tag leaves the text before it free.
        constrained=structured is not None and "structural_tag" not in structured,
    )
