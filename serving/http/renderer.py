"""From a conversation to the text of a prompt, by a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequestError
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations.

    Attributes:
        tokenizer: has the model's templates; None = nothing can be rendered.
        template: a Jinja source to use instead of the model's; None = the model's.
    """

    tokenizer: Tokenizer | None
    template: str | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Encode it without special tokens: the template writes them.

        Args:
            messages: as OpenAI's; content is text or a list of text parts.
            add_generation_prompt, continue_final_message: as in `Tokenizer.apply_chat_template`.
            template: a source for this conversation alone.
            variables: `tools`, `documents` and whatever else the template may read.

        Raises:
            InvalidRequestError: no tokenizer, parts that are not text, or the template refuses the messages.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(
                "a chat needs a tokenizer; this engine has none (skip_tokenizer_init): use /v1/completions.", "messages"
            )
        source = template if template is not None else self.template
        given = dict(variables or {})
        if reserved := sorted(given.keys() & {"messages", "add_generation_prompt"}):
            raise InvalidRequestError(f"chat_template_kwargs must not set {reserved}.", "chat_template_kwargs")
        plain = [_plain_message(message, number) for number, message in enumerate(messages)]
        if not self._knows_developer(source, bool(given.get("tools"))):
            plain = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in plain]
        return self.tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=source,
            **given,
        )

    def _knows_developer(self, source: str | None, has_tools: bool) -> bool:
        templates = self.tokenizer.chat_templates if self.tokenizer else {}
        chosen = source or (templates.get("tool_use") if has_tools else None) or templates.get("default") or ""
        return "developer" in chosen


def _plain_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message as templates expect it: content is text, the arguments of tool calls are objects."""
    plain = {name: value for name, value in message.items() if value is not None}
    plain["content"] = text_of(message.get("content"), f"messages.{number}.content")
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call, f"messages.{number}.tool_calls") for call in calls]
    return plain


def text_of(content: Any, place: str) -> str:
    """The text of a message's content; parts are joined by line ends, as in vLLM.

    Raises:
        InvalidRequestError: a part is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise InvalidRequestError(
                f"{place} has a part of type {kind!r}; the model reads text only: use parts of type 'text'.", "messages"
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InvalidRequestError(f"{place} has a part of type {kind!r} without its text.", "messages")
        texts.append(text)
    return "\n".join(texts)


def _plain_call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{place} must hold calls of functions with a name.", "messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise InvalidRequestError(f"{place}: arguments must be JSON text.", "messages") from None
    return {**call, "function": {**function, "arguments": arguments}}
