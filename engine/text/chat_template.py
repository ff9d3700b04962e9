"""Chat templates: a conversation rendered to text by the model's own Jinja source, as transformers renders it.

Templates come from strangers, so they run in Jinja's immutable sandbox and see nothing but plain data. Options,
filters and globals are those of transformers (`utils/chat_template_utils.py`), since templates are written against
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequestError

Message = Mapping[str, Any]

# transformers passes a message's reasoning under all names that templates read.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Ends with a space to tell whether the template strips the message's end.
_FINAL_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_CACHED_TEMPLATES = 32


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text for training; here it renders its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The statements between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=_MAX_CACHED_TEMPLATES)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _plain(value: Any) -> Any:
    """A copy made of JSON's types only: a template cannot reach a method of the caller's objects through it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise InvalidRequestError(
        "messages and template variables must be plain data (dict, list, str, number, bool, None), "
        f"got {type(value).__name__}.",
        parameter="messages",
    )


def _alias_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _open_final_message(messages: list[dict[str, Any]]) -> str:
    """Append the tag to the last message's last text; returns that text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + _FINAL_TAG
        return content
    for block in reversed(content if isinstance(content, list) else []):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text = block["text"]
            block["text"] = text + _FINAL_TAG
            return text
    raise InvalidRequestError(
        "continue_final_message needs a last message with text in its content.", parameter="continue_final_message"
    )


def _cut_at_tag(rendered: str, final_text: str) -> str:
    """What was rendered up to the end of the final message."""
    tag = _FINAL_TAG.strip()
    if tag not in rendered or final_text.strip() not in rendered:
        raise InvalidRequestError(
            "continue_final_message is not possible: the chat template leaves out parts of the final message.",
            parameter="continue_final_message",
        )
    position = rendered.rindex(tag)
    text = rendered[:position]
    # If the space after the tag is gone, the template strips message ends: then the open one is stripped likewise.
    return text if rendered[position : position + len(_FINAL_TAG)] == _FINAL_TAG else text.rstrip()


def render_chat(
    source: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """Render a conversation.

    Args:
        source: the Jinja template.
        messages: plain data; never changed.
        variables: what else the template may read; `tools` and `documents` are None unless given.
        add_generation_prompt: passed on to the template.
        continue_final_message: cut the text at the end of the final message.

    Raises:
        InvalidRequestError: the template is no Jinja, refuses the messages, or fails on them.
    """
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other.", parameter="continue_final_message"
        )
    chat = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InvalidRequestError(
                f"messages must hold objects, got {type(message).__name__}.", parameter="messages"
            )
        chat.append(_alias_reasoning(_plain(message)))
    final_text = _open_final_message(chat) if continue_final_message else None
    try:
        template = _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequestError(
            f"The chat template is not valid Jinja: {error.message} (line {error.lineno}).", parameter="chat_template"
        ) from error
    known = {"tools": None, "documents": None, **{name: _plain(value) for name, value in variables.items()}}
    try:
        rendered = template.render(messages=chat, add_generation_prompt=add_generation_prompt, **known)
    except jinja2.TemplateError as error:
        raise InvalidRequestError(
            f"The chat template refuses these messages: {error}.", parameter="messages"
        ) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        # A template's own mistake, or messages of a form that it does not expect (content that is a list, no role …).
        raise InvalidRequestError(
            f"The chat template fails on these messages: {error}.", parameter="messages"
        ) from error
    return rendered if final_text is None else _cut_at_tag(rendered, final_text)
