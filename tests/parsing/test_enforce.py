"""Enforced tool choices: what the schemas let pass is what the parsers read as calls."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from serving.parsing.answer import parse_answer
from serving.parsing.enforce import schema_of_named, schema_of_required
from serving.parsing.formats import answer_format
from tests.parsing.corpus import named, shown

_POINT = {
    "type": "object",
    "properties": {
        "x": {"$ref": "#/$defs/Number"},
        "next": {"$ref": "#"},
        "enum": {"$ref": "#"},
        "$ref": {"const": {"$ref": "#"}},
    },
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"Number": {"type": "integer"}},
}
_NAMED = {
    "type": "object",
    "properties": {"who": {"$ref": "#/$defs/Number"}},
    "required": ["who"],
    "additionalProperties": False,
    "$defs": {"Number": {"enum": ["one", "two"]}},  # the same name as the other's: each means its own
}
FUNCTIONS: list[dict[str, Any]] = [
    {"name": "point", "parameters": _POINT},
    {"name": "greet", "parameters": _NAMED},
    {"name": "nothing"},
    {"name": "anything", "parameters": {"properties": {}}},
]
_TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]


def _accepts(schema: dict[str, Any], text: str) -> bool:
    """True if the whole text satisfies the schema, as the engine's grammars see it."""
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    )
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("call", "accepted"),
    [
        ('{"name":"point","parameters":{"x":1}}', True),
        ('{"name": "point", "parameters": {"x": 1, "next": {"x": 2}, "enum": {"x": 3}}}', True),
        ('{"name":"greet","parameters":{"who":"one"}}', True),
        ('{"name":"nothing","parameters":{}}', True),
        ('{"name":"anything","parameters":{"a":[]}}', True),
        ('{"name":"point","parameters":{"x":"one"}}', False),
        ('{"name":"point","parameters":{"x":1,"next":{}}}', False),
        ('{"name":"greet","parameters":{"who":1}}', False),
        ('{"name":"nothing","parameters":{"a":1}}', False),
        ('{"name":"anything","parameters":[]}', False),
        ('{"name":"other","parameters":{}}', False),
        ('{"parameters":{}}', False),
    ],
)
def test_required(call: str, accepted: bool) -> None:
    """One call or two, each of a tool, with the arguments of that tool; and the parser reads them."""
    answers = answer_format(tools=_TOOLS, tool_choice="required")
    assert answers.json_schema is not None
    for text, count in ((f"[{call}]", 1), (f"[{call}, {call}]", 2)):
        assert _accepts(answers.json_schema, text) == accepted
        if accepted:
            content, _, calls = shown(parse_answer(answers.parser(), text))
            value = json.loads(call)
            assert content is None
            assert [(name, json.loads(arguments)) for name, arguments in calls] == [
                (value["name"], value["parameters"])
            ] * count


def test_required_is_required() -> None:
    """No call is not enough; without parallel calls two are too many."""
    call = '{"name":"nothing","parameters":{}}'
    several = schema_of_required(FUNCTIONS, parallel=True)
    single = schema_of_required(FUNCTIONS, parallel=False)
    assert not _accepts(several, "[]") and not _accepts(single, "[]")
    assert _accepts(single, f"[{call}]") and not _accepts(single, f"[{call},{call}]")


def test_named() -> None:
    """The bare arguments, and the parser gives them to the function."""
    answers = answer_format(tools=_TOOLS, tool_choice=named("greet"))
    assert answers.json_schema is not None
    assert _accepts(answers.json_schema, '{"who": "two"}')
    assert not _accepts(answers.json_schema, '{"who": "three"}')
    assert shown(parse_answer(answers.parser(), '{"who": "two"}')) == (None, None, [("greet", '{"who": "two"}')])


def test_named_without_parameters() -> None:
    """A function without parameters has none; one whose schema has no type still takes an object."""
    assert _accepts(schema_of_named(FUNCTIONS[2]), "{}")
    assert not _accepts(schema_of_named(FUNCTIONS[2]), '{"a": 1}')
    assert not _accepts(schema_of_named(FUNCTIONS[3]), "3")


def test_only_enforced_choices_have_a_schema() -> None:
    """ "auto" and "none" leave the model free."""
    for choice in (None, "auto", "none"):
        assert answer_format(tool_parser="hermes", tools=_TOOLS, tool_choice=choice).json_schema is None  # pyright: ignore
