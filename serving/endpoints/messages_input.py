"""From Anthropic's messages to a `ChatRequest`."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import InvalidRequestError
from serving.protocol.chat import ChatRequest
from serving.protocol.messages import (
    ClientTool,
    InputMessage,
    MessagesInput,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: MessagesInput) -> ChatRequest:
    """The same conversation for the chat endpoint.

    Raises:
        InvalidRequestError: a block stands where it cannot, or a feature is not there.
        ValidationError: as `ChatRequest`.
    """
    body.check_missing()
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": _text(body.system)})
    for number, message in enumerate(body.messages):
        for part in _messages(message, f"messages.{number}"):
            _append(messages, part)
    made: dict[str, Any] = {"model": body.model, "messages": messages}
    if messages[-1]["role"] == "assistant":
        if "tool_calls" in messages[-1]:
            raise InvalidRequestError("messages: tool_use must be followed by its tool_result.", "messages")
        made |= {"continue_final_message": True, "add_generation_prompt": False}
    made |= _tools(body)
    if body.thinking is not None:
        made["chat_template_kwargs"] = {"enable_thinking": _wants_thinking(body)}
        made["include_reasoning"] = body.thinking.type != "disabled"
    if isinstance(body, MessagesRequest):
        made |= _sampling(body)
    return ChatRequest.model_validate(made)


def _wants_thinking(body: MessagesInput) -> bool:
    assert body.thinking is not None
    if body.thinking.type == "enabled" or body.thinking.budget_tokens is not None:
        raise InvalidRequestError(
            "thinking with a budget of tokens cannot be kept here: use the type 'adaptive' or 'disabled', without one.",
            "thinking",
        )
    return body.thinking.type == "adaptive"


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    given = {
        "max_completion_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "stream": body.stream,
    }
    return {name: value for name, value in given.items() if value is not None}


def _tools(body: MessagesInput) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if body.tools is not None:
        made["tools"] = [_tool(tool) for tool in body.tools]
    choice = body.tool_choice
    if choice is None:
        return made
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequestError("tool_choice of type 'tool' needs a name.", "tool_choice")
        made["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        made["tool_choice"] = CHOICES[choice.type]
    if choice.disable_parallel_tool_use:
        made["parallel_tool_calls"] = False
    return made


def _tool(tool: ClientTool) -> dict[str, Any]:
    if tool.input_schema.get("type", "object") != "object":
        raise InvalidRequestError(f"tools: the input_schema of {tool.name!r} must be of type 'object'.", "tools")
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _messages(message: InputMessage, place: str) -> list[dict[str, Any]]:
    """One message as OpenAI has it; results of tools become messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    return _assistant(message, place) if message.role == "assistant" else _user(message, place)


def _append(messages: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a message. Turns of the user in a row are one, as in the API: many templates want the roles to alternate."""
    if messages and part["role"] == "user" == messages[-1]["role"]:
        messages[-1]["content"] += "\n" + part["content"]
    else:
        messages.append(part)


def _user(message: InputMessage, place: str) -> list[dict[str, Any]]:
    results, texts = [], []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            text = _text(block.content or "")
            content = f"Error: {text}" if block.is_error else text
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        else:
            raise InvalidRequestError(f"{place}: a user's message has text and tool_result blocks only.", "messages")
    return [*results, *([{"role": "user", "content": "\n".join(texts)}] if texts or not results else [])]


def _assistant(message: InputMessage, place: str) -> list[dict[str, Any]]:
    texts, thoughts, calls = [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            raise InvalidRequestError(f"{place}: an assistant's message has no tool_result blocks.", "messages")
    made: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        made["reasoning"] = "\n".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return [made]


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
