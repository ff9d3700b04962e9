"""Bodies of `/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from serving.protocol.base import RequestBody, ResponseBody
from serving.protocol.chat import ChatMessage, Tool


class TokenizeRequest(RequestBody):
    """`POST /tokenize`: of a text (`prompt`) or of a conversation (`messages`), one of the two.

    `add_special_tokens` is true for a text by default, and false for a conversation: there the template writes them.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class TokenizeResponse(ResponseBody):
    """The ids, and with return_token_strs the vocabulary's spelling of each."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


class DetokenizeResponse(ResponseBody):
    """The text."""

    prompt: str
