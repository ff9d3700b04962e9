"""Bodies of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.protocol.base import Missing, RequestBody, ResponseBody

_STATELESS = "the server keeps no responses: send the whole conversation in input."
_NO_TOOLS = Missing("there are no built-in tools.")


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class FunctionTool(_Part):
    """A function that the model may call; `parameters` is JSON Schema."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(_Part):
    """Which function must be called."""

    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    """What the answer must look like. `schema` is JSON Schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    """Options of the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: TextFormat | None = None


class ReasoningOptions(BaseModel):
    """Options of the reasoning; `effort` is a variable of the chat template."""

    model_config = ConfigDict(extra="forbid", strict=True)

    effort: str | None = None


class ResponsesRequest(RequestBody):
    """`POST /v1/responses`: the next items of a conversation. `metadata`, `user`, `safety_identifier` and
    `prompt_cache_key` are labels without effect.
    """

    MISSING: ClassVar[Mapping[str, Missing]] = {
        "store": Missing(_STATELESS, (False,)),
        "previous_response_id": Missing(_STATELESS),
        "conversation": Missing(_STATELESS),
        "background": Missing(_STATELESS, (False,)),
        "prompt": Missing("there are no stored prompts."),
        "include": Missing("there is nothing more to include.", ([],)),
        "max_tool_calls": _NO_TOOLS,
        "top_logprobs": Missing("use /v1/chat/completions for log-probabilities.", (0,)),
        "truncation": Missing("an input that is too long is refused.", ("disabled",)),
        "stream_options": Missing("a stream ends with its usage anyway.", ({},)),
        "service_tier": Missing("there is one tier.", ("auto", "default")),
    }

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    # vLLM's extras, as in chat
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None


class ResponsesResponse(ResponseBody):
    """What `/v1/responses` answers: items of type message, reasoning and function_call."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    usage: dict[str, Any] | None = None
    user: str | None = None
