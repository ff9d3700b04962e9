"""What a user may write in `StructuredOutputsParams`, each fault refused by one message that names the parameter."""

from __future__ import annotations

import json
import pickle
from typing import Any

import msgspec
import pytest

import engine
from engine.errors import InvalidRequestError
from engine.sampling_params import SamplingParams
from engine.structured.params import MAX_CHOICES, MAX_GRAMMAR_CHARS, MAX_JSON_DEPTH, StructuredOutputsParams
from engine.structured.schema import close_objects


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of"),
    ({"json_object": False}, "exactly one of"),
    ({"regex": "a", "choice": ["a"]}, "got regex, choice"),
    ({"json": "{", "json_object": None}, "not valid JSON"),
    ({"json": '{"const": NaN}'}, "NaN is not JSON"),
    ({"json": {"const": float("inf")}}, "not valid JSON"),
    ({"json": {"const": object()}}, "not valid JSON"),
    ({"json": "[1]"}, "must be a JSON object"),
    ({"json": [1]}, "must be a JSON object"),
    ({"json": nested(MAX_JSON_DEPTH + 1)}, "64 levels"),
    ({"json": "[" * 100_000}, "64 levels"),
    ({"json": json.dumps({"const": "x" * MAX_GRAMMAR_CHARS})}, "at most 1048576 characters"),
    ({"json": {"const": "x" * MAX_GRAMMAR_CHARS}}, "at most 1048576 characters"),
    ({"regex": ""}, "non-empty text"),
    ({"regex": 7}, "non-empty text"),
    ({"regex": "\ud800"}, "surrogate"),
    ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "at most"),
    ({"grammar": ""}, "non-empty text"),
    ({"choice": []}, "non-empty list"),
    ({"choice": "yes"}, "non-empty list"),
    ({"choice": ["a", 1]}, "non-empty text"),
    ({"choice": ["a", ""]}, "non-empty text"),
    ({"choice": ["a"] * (MAX_CHOICES + 1)}, "at most 16384 texts"),
    ({"choice": ["a" * 600_000, "b" * 600_000]}, "characters in all"),
    ({"json_object": 1}, "json_object must be True or False"),
    ({"structural_tag": "[]"}, "must be a JSON object"),
    ({"structural_tag": True}, "must be a JSON object"),
    ({"json_object": True, "disable_any_whitespace": "yes"}, "disable_any_whitespace must be True or False"),
    ({"regex": "a", "disable_any_whitespace": True}, "goes only with json or json_object"),
    ({"choice": ["a"], "whitespace_pattern": " "}, "goes only with json or json_object"),
    ({"json_object": True, "disable_additional_properties": True}, "goes only with json,"),
    ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern must be non-empty text"),
    ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "contradict"),
]


@pytest.mark.parametrize(("fields", "says"), FAULTS)
def test_faults(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StructuredOutputsParams(**fields)
    assert says in str(caught.value)
    assert caught.value.parameter == "structured_outputs"


def test_a_schema_is_kept_as_text_in_its_own_order() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    params = StructuredOutputsParams(json=schema)
    assert params.json == json.dumps(schema) and params.kind == "json"
    assert params == StructuredOutputsParams(json=json.dumps(schema))
    assert StructuredOutputsParams(json=nested(MAX_JSON_DEPTH)).kind == "json"


def test_they_are_plain_values_that_cross_a_process_border() -> None:
    params = StructuredOutputsParams(choice=["b", "a", "b"], disable_any_whitespace=False)
    assert params.choice == ("b", "a")
    assert hash(params) == hash(StructuredOutputsParams(choice=("b", "a")))
    assert pickle.loads(pickle.dumps(params)) == params
    packed = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(packed, type=StructuredOutputsParams) == params


def test_sampling_params_take_nothing_else() -> None:
    assert engine.StructuredOutputsParams is StructuredOutputsParams
    with pytest.raises(InvalidRequestError, match="structured_outputs must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


LISTED = {"properties": {"a": {}}}
CLOSED = {**LISTED, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (LISTED, CLOSED),
        ({"patternProperties": {"a": LISTED}}, {"patternProperties": {"a": CLOSED}, "additionalProperties": False}),
        ({**LISTED, "additionalProperties": True}, {**LISTED, "additionalProperties": True}),
        ({"type": "object"}, {"type": "object"}),
        ({"items": LISTED}, {"items": CLOSED}),
        ({"prefixItems": [LISTED, True]}, {"prefixItems": [CLOSED, True]}),
        ({"$defs": {"properties": LISTED}}, {"$defs": {"properties": CLOSED}}),
        # Data is not a schema.
        (
            {"const": LISTED, "enum": [LISTED], "default": LISTED},
            {"const": LISTED, "enum": [LISTED], "default": LISTED},
        ),
        # Parts of a whole stay open, alternatives do not.
        ({"anyOf": [LISTED, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"allOf": [LISTED, LISTED]}, {"allOf": [LISTED, LISTED]}),
        ({**LISTED, "anyOf": [LISTED]}, {**LISTED, "anyOf": [LISTED]}),
        ({"allOf": [{"items": LISTED}]}, {"allOf": [{"items": CLOSED}]}),
        ({**LISTED, "$ref": "#/$defs/x"}, {**LISTED, "$ref": "#/$defs/x"}),
    ],
)
def test_disable_additional_properties(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert close_objects(schema) == expected
    assert json.dumps(schema) == before
