"""Bodies of `/v1/messages`, as Anthropic has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.protocol.base import Missing, RequestBody, ResponseBody


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class TextBlock(_Part):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(_Part):
    """Reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(_Part):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Part):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool = False


InputBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class InputMessage(_Part):
    """One message."""

    role: Literal["user", "assistant"]
    content: str | list[InputBlock]


class ClientTool(_Part):
    """A tool that the client runs; `input_schema` is JSON Schema of an object. A call is held to it where the
    tool_choice forces one.
    """

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Literal[False] | None = None
    defer_loading: Literal[False] | None = None


class ToolChoice(_Part):
    """Whether, and which, tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(BaseModel):
    """Whether the model reasons. "enabled" sets a budget, which cannot be kept here, and is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None


class MessagesInput(RequestBody):
    """A conversation."""

    MISSING: ClassVar[Mapping[str, Missing]] = {
        "container": Missing("there are no containers."),
        "mcp_servers": Missing("there are no MCP servers.", ([],)),
        "context_management": Missing("edit the messages."),
        "service_tier": Missing("there is one tier.", ("auto", "standard_only")),
        "inference_geo": Missing("there is one place."),
        "speed": Missing("there is one speed.", ("standard",)),
        "diagnostics": Missing("see /requests/{id}/timeline.", (False,)),
        "output_format": Missing("use tools with a tool_choice, or response_format of /v1/chat/completions."),
        "output_config": Missing("use tools with a tool_choice, or response_format of /v1/chat/completions."),
    }

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(MessagesInput):
    """`POST /v1/messages`: the next message of a conversation. `metadata` is a label without effect."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None


class CountResponse(ResponseBody):
    """What `/v1/messages/count_tokens` answers."""

    input_tokens: int


class MessagesUsage(ResponseBody):
    """Tokens. Those of the prompt that were in the prefix cache are counted in `cache_read_input_tokens` only."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesResponse(ResponseBody):
    """What `/v1/messages` answers: blocks of type text, thinking and tool_use."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessagesErrorInfo(ResponseBody):
    """One fault."""

    type: str
    message: str


class MessagesError(ResponseBody):
    """The body of every answer with a status of 400 or more, and of the event that ends a failed stream."""

    type: Literal["error"] = "error"
    error: MessagesErrorInfo
