"""From the items of `/v1/responses` to a `ChatRequest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequestError
from serving.protocol.chat import ChatRequest
from serving.protocol.responses import FunctionTool, NamedFunction, ResponsesRequest, TextFormat

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")

# The same name, and the same meaning, in both APIs.
_SAME_NAMES = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "priority",
    "cache_salt",
    "request_id",
    "stream",
    "parallel_tool_calls",
)

# The chat endpoint's name of a field -> this API's.
NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "structured_outputs": "text",
    "reasoning_effort": "reasoning",
    "prompt": "input",
}


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same conversation for the chat endpoint.

    Raises:
        InvalidRequestError: an item is not known or not whole, or a feature is not there.
    """
    body.check_missing()
    made: dict[str, Any] = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    made["messages"] = messages + _messages(body.input)
    if body.max_output_tokens is not None:
        made["max_completion_tokens"] = body.max_output_tokens
    if body.tools is not None:
        made["tools"] = [_tool(tool) for tool in body.tools]
    if isinstance(body.tool_choice, NamedFunction):
        made["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    elif body.tool_choice is not None and (body.tools or body.tool_choice != "auto"):
        made["tool_choice"] = body.tool_choice
    if body.text is not None and body.text.format is not None:
        made["response_format"] = _format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        made["reasoning_effort"] = body.reasoning.effort
    return ChatRequest.model_validate(made)


def _format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.json_schema is None:
        raise InvalidRequestError("text.format of type json_schema needs a schema.", "text")
    return {"type": "json_schema", "json_schema": {"name": wanted.name or "answer", "schema": wanted.json_schema}}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": function}


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages. Reasoning, text and calls of the assistant that follow each other are one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        place = f"input.{number}"
        part = _part(item, place)
        last = messages[-1] if messages else None
        if part["role"] == "assistant" and last is not None and last["role"] == "assistant":
            _join(last, part)
        else:
            messages.append(part)
    return messages


def _join(message: dict[str, Any], part: dict[str, Any]) -> None:
    for name in ("content", "reasoning"):
        texts = [text for text in (message.get(name), part.get(name)) if text]
        if texts:
            message[name] = "\n".join(texts)
    if calls := part.get("tool_calls"):
        message["tool_calls"] = [*message.get("tool_calls", []), *calls]


def _part(item: dict[str, Any], place: str) -> dict[str, Any]:
    """One item as a message.

    Raises:
        InvalidRequestError: it is not known, or not whole.
    """
    match item.get("type", "message"):
        case "message":
            if item.get("role") not in ROLES:
                raise InvalidRequestError(f"{place}: role must be one of {', '.join(ROLES)}.", "input")
            return {"role": item["role"], "content": _text(item.get("content"), f"{place}.content")}
        case "function_call":
            name, arguments = _string(item, "name", place), _string(item, "arguments", place)
            call = {"id": _string(item, "call_id", place), "type": "function"}
            return {"role": "assistant", "tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}
        case "function_call_output":
            content = _text(item.get("output"), f"{place}.output")
            return {"role": "tool", "tool_call_id": _string(item, "call_id", place), "content": content}
        case "reasoning":
            texts = item.get("content") or item.get("summary") or []
            return {"role": "assistant", "reasoning": _text(texts, place)}
        case kind:
            known = "message, function_call, function_call_output, reasoning"
            raise InvalidRequestError(
                f"{place}: items of type {kind!r} are not known here; there are {known}.", "input"
            )


def _string(item: dict[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{place}.{name} must be text, got {value!r:.100}.", "input")
    return value


def _text(content: Any, place: str) -> str:
    """The text of a content: text, or a list of parts of text.

    Raises:
        InvalidRequestError: something in it is not text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{place} must be text or a list of parts.", "input")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXTS or not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{place}: parts must be text, of type {' or '.join(TEXTS[:2])}.", "input")
        texts.append(part["text"])
    return "\n".join(texts)
