"""What a request gives as its prompt → token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from engine.errors import ContextLengthError, InvalidRequestError
from serving.http.context import ServerContext
from serving.protocol.completions import MAX_PROMPTS, CompletionRequest

# No token is longer than this in any supported vocabulary, nearly: a text of more characters than this for every
# position cannot fit, so that it is not worth encoding.
MAX_CHARS_PER_TOKEN = 512


class PromptOptions(Protocol):
    """What a body may say of its prompts, whatever it wants to be made of them."""

    truncate_prompt_tokens: int | None
    cache_salt: str | None

    @property
    def output_room(self) -> int:
        """Positions that the output needs at least, as far as the body says."""
        ...


async def completion_prompts(context: ServerContext, body: CompletionRequest) -> list[dict[str, Any]]:
    """The prompts of a completion request, each `{"prompt_token_ids", "prompt"?, "cache_salt"?}`.

    Raises:
        InvalidRequestError: none or too many, empty, or with truncate_prompt_tokens out of range.
    """
    prompts = several_prompts(body.prompt, "prompt")
    special = True if body.add_special_tokens is None else body.add_special_tokens
    return [await engine_prompt(context, body, prompt, add_special_tokens=special) for prompt in prompts]


def several_prompts(
    given: str | Sequence[int] | Sequence[str] | Sequence[list[int]], name: str
) -> Sequence[str | list[int]]:
    """One prompt or many, as a list of them.

    Args:
        name: of the field that brings them.

    Raises:
        InvalidRequestError: none or too many.
    """
    is_one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    prompts = cast("Sequence[str | list[int]]", [given] if is_one else given)
    if not prompts:
        raise InvalidRequestError(f"the {name} must not be empty.", name)
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequestError(f"at most {MAX_PROMPTS} prompts are allowed, got {len(prompts)}.", name)
    return prompts


async def engine_prompt(
    context: ServerContext, body: PromptOptions, prompt: str | list[int], *, add_special_tokens: bool
) -> dict[str, Any]:
    """One prompt for the engine.

    Raises:
        InvalidRequestError: it is empty, or truncate_prompt_tokens is out of range.
        ContextLengthError: the text is so long that it cannot fit.
    """
    if not prompt:
        raise InvalidRequestError("the prompt must not be empty.", "prompt")
    made: dict[str, Any] = {}
    if isinstance(prompt, str):
        _check_length(context, prompt, cut=body.truncate_prompt_tokens is not None)
        made["prompt"] = prompt
        ids = await context.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        ids = prompt
    made["prompt_token_ids"] = _truncate(context, body, ids)
    if body.cache_salt is not None:
        made["cache_salt"] = body.cache_salt
    return made


def _check_length(context: ServerContext, text: str, *, cut: bool) -> None:
    limit = context.client.info.max_model_len
    if not cut and len(text) > limit * MAX_CHARS_PER_TOKEN:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, your prompt has {len(text)} characters, "
            "which cannot fit. Shorten the prompt."
        )


def _truncate(context: ServerContext, body: PromptOptions, ids: list[int]) -> list[int]:
    """The last `truncate_prompt_tokens` ids; -1 = as many as leave room for the output."""
    wanted = body.truncate_prompt_tokens
    if wanted is None:
        return ids
    limit = context.client.info.max_model_len
    if wanted == -1:
        wanted = max(1, limit - body.output_room)
    if not 1 <= wanted <= limit:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be -1 or 1 to {limit}, got {wanted}.", "truncate_prompt_tokens"
        )
    return ids[-wanted:]
