"""`StructuredOutputsParams`: what a completion must look like, with vLLM's field names. Plain values only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from engine.errors import InvalidRequestError

PARAMETER = "structured_outputs"
MAX_GRAMMAR_CHARS = 1 << 20
MAX_JSON_DEPTH = 64
MAX_CHOICES = 16384

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
JSON_KINDS = ("json", "json_object")


def refuse(message: str) -> InvalidRequestError:
    """The one error of this package: names the parameter."""
    return InvalidRequestError(f"structured_outputs: {message}", PARAMETER)


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What a completion must look like. Exactly one of the first six fields is given.

    Attributes:
        json: a JSON schema, as its text or as a dict (kept as text). Draft 2020-12 as far as llguidance knows it; a
            keyword that it does not know is refused.
        regex: a regular expression that the whole text matches (Rust's syntax; no look-around, no back references).
        choice: one of these texts.
        grammar: a Lark grammar whose start rule is `start`, in llguidance's dialect.
        json_object: True: any JSON object.
        structural_tag: free text with parts that follow a schema, as JSON text or a dict (kept as text):
            `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`.
        disable_any_whitespace: JSON without whitespace between its parts.
        disable_additional_properties: JSON objects have only the properties that their schema lists, as if each said
            `additionalProperties: false`. Schemas joined by allOf, anyOf and the like are left as they are.
        whitespace_pattern: a regular expression of the whitespace between JSON's parts.

    Raises:
        InvalidRequestError: on construction, if a type is wrong, none or several of the six are given, an option does
            not go with them, or a text is too long or nested too deeply. Grammars themselves are checked by the engine
            before a request starts.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "json_object" and value is None):
                raise refuse(f"{name} must be True or False, got {value!r}.")
        put(self, "json_object", self.json_object or None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise refuse(f"give exactly one of {', '.join(KINDS)}; got {', '.join(given) or 'none of them'}.")
        put(self, "json", _json_text("json", self.json, allow_bool=True))
        put(self, "structural_tag", _json_text("structural_tag", self.structural_tag))
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        put(self, "choice", None if self.choice is None else _choices(self.choice))
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            allowed = ("json",) if name == "disable_additional_properties" else JSON_KINDS
            if getattr(self, name) and self.kind not in allowed:
                raise refuse(f"{name} goes only with {' or '.join(allowed)}, not with {self.kind}.")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise refuse("disable_any_whitespace and whitespace_pattern contradict each other; give one of them.")

    @property
    def kind(self) -> str:
        """The name of the field that is given, one of `KINDS`."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def replace(self, **changes: Any) -> StructuredOutputsParams:
        """A validated copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names that a user may set."""
        return tuple(f.name for f in fields(cls))


def _check_text(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise refuse(f"{name} must be non-empty text, got {value!r}.")
    if len(value) > MAX_GRAMMAR_CHARS:
        raise refuse(f"{name} may have at most {MAX_GRAMMAR_CHARS} characters, got {len(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse(f"{name} must be valid Unicode text; it has a lone surrogate.") from None


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise refuse(f"choice must be a non-empty list of texts, got {value!r}.")
    if len(value) > MAX_CHOICES:
        raise refuse(f"choice may have at most {MAX_CHOICES} texts, got {len(value)}.")
    for text in value:
        _check_text("choice", text)
    if sum(map(len, value)) > MAX_GRAMMAR_CHARS:
        raise refuse(f"choice may have at most {MAX_GRAMMAR_CHARS} characters in all.")
    return tuple(dict.fromkeys(value))


def _json_text(name: str, value: Any, *, allow_bool: bool = False) -> str | None:
    """The JSON text of a document given as text or as a dict; the order of keys is kept, as it is the order in which
    properties are generated.
    """
    if value is None:
        return None
    if isinstance(value, str):
        _check_text(name, value)
        document = _guard(name, lambda: json.loads(value, parse_constant=_no_constant))
    else:
        document = value
    if not isinstance(document, (dict, bool) if allow_bool else dict):
        raise refuse(f"{name} must be a JSON object, as text or as a dict, got {document!r:.200}.")
    if depth_of(document, MAX_JSON_DEPTH) > MAX_JSON_DEPTH:
        raise refuse(f"{name} may be nested at most {MAX_JSON_DEPTH} levels deep.")
    text = value if isinstance(value, str) else _guard(name, lambda: json.dumps(value, allow_nan=False))
    _check_text(name, text)
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _guard(name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except RecursionError:
        raise refuse(f"{name} may be nested at most {MAX_JSON_DEPTH} levels deep.") from None
    except (TypeError, ValueError) as error:
        raise refuse(f"{name} is not valid JSON: {error}.") from None


def depth_of(document: Any, limit: int) -> int:
    """How deeply a JSON document is nested: 0 for a scalar. Stops counting one beyond `limit`."""
    depth, level = 0, [document]
    while depth <= limit:
        inner: list[Any] = []
        found = False
        for value in level:
            if isinstance(value, dict):
                found = True
                inner.extend(value.values())
            elif isinstance(value, Sequence) and not isinstance(value, str):
                found = True
                inner.extend(value)
        if not found:
            break
        depth, level = depth + 1, inner
    return depth
