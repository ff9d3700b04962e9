"""Bodies of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from serving.protocol.base import Missing, ResponseBody, Usage
from serving.protocol.sampling import MISSING, SamplingFields

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16  # OpenAI's

_Prompts = (
    Annotated[list[str], Field(max_length=MAX_PROMPTS)] | Annotated[list[list[int]], Field(max_length=MAX_PROMPTS)]
)


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`: go on with one or many texts."""

    MISSING: ClassVar[Mapping[str, Missing]] = {
        **MISSING,
        "suffix": Missing("the models write on, they do not fill in.", ("",)),
    }

    prompt: str | list[int] | _Prompts
    echo: bool | None = None
    logprobs: int | None = None


class CompletionLogprobs(ResponseBody):
    """One entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseBody):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionResponse(ResponseBody):
    """What `/v1/completions` answers; the chunks of a stream have the same form."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
