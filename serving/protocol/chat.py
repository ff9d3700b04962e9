"""Bodies of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.protocol.base import Missing, ResponseBody, Usage
from serving.protocol.sampling import MISSING, SamplingFields

_TOOLS = Missing("use tools and tool_choice.")


class ChatMessage(BaseModel):
    """One message. Other fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class FunctionTool(BaseModel):
    """A function that the model may call; `parameters` is JSON Schema."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: FunctionTool


class NamedFunction(BaseModel):
    """Which function must be called."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str


class NamedToolChoice(BaseModel):
    """Which tool must be called."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`: the next message of a conversation."""

    MISSING: ClassVar[Mapping[str, Missing]] = {
        **MISSING,
        "functions": _TOOLS,
        "function_call": _TOOLS,
        "modalities": Missing("answers are text.", (["text"],)),
        "audio": Missing("answers are text."),
        "prediction": Missing("there are no predicted outputs."),
        "web_search_options": Missing("there is no web search."),
        "verbosity": Missing("say in a message how long the answer should be."),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True


class TopLogprob(ResponseBody):
    """A candidate token. `bytes` are its UTF-8 bytes, part of a character where the token is."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """A token of the answer, with the most probable candidates for its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    """One entry per token."""

    content: list[TokenLogprob] | None = None


class FunctionCall(ResponseBody):
    """`arguments` is JSON text. In a stream: more of it; the name comes once."""

    name: str | None = None
    arguments: str = ""


class ToolCall(ResponseBody):
    """A call that the model makes. `index` is there in streams only."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = "function"
    function: FunctionCall


class AnswerMessage(ResponseBody):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


ChatFinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class ChatChoice(ResponseBody):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(ResponseBody):
    """What `/v1/chat/completions` answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class ChatDelta(ResponseBody):
    """What is new in a stream."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChunkChoice(ResponseBody):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(ResponseBody):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
