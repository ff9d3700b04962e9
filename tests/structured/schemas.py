"""Two hundred JSON schemas: some that people write, the rest drawn from a seeded generator.

All are small enough for a model that samples at random to reach the end: strings and arrays are bounded.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

Schema = dict[str, Any]
NUM_SCHEMAS = 200
WORDS = ("name", "id", "kind", "größe", "a b", 'quo"te', "x-y", "价格", "value", "$ref_", "items", "type")
PATTERNS = (
    "^[a-z]{1,6}$",
    "^(foo|bar)-[0-9]{2}$",
    "^[A-Z][a-z]*$",
    "^\\d{3}$",
    "^a?b+c$",
    '^[^"\\\\\\x00-\\x1f]{0,4}$',
)
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None, **more: Any) -> Schema:
    properties = {**required, **(optional or {})}
    base = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {**base, **more}


def _text(most: int = 8) -> Schema:
    return {"type": "string", "maxLength": most}


PERSON = _object({"name": _text(), "age": {"type": "integer", "minimum": 0, "maximum": 150}}, {"email": _text(5)})
TREE = {
    "$defs": {"node": _object({"v": {"type": "integer"}}, {"left": {"$ref": "#/$defs/node"}})},
    "$ref": "#/$defs/node",
}
WRITTEN: dict[str, Any] = {
    "person": PERSON,
    "tree": TREE,
    "people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    "any_object": {"type": "object", "maxProperties": 2, "additionalProperties": {"type": "integer"}},
    "true": True,
    "empty": {},
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "nullable": {"type": ["string", "null"], "maxLength": 3},
    "enum_of_all_types": {"enum": [1, 1.5, "one", None, True, [1, 2], {"a": 1}]},
    "const_object": {"const": {"b": [1, {"c": None}], "a": "é"}},
    "tool_call": _object(
        {"name": {"const": "get_weather"}, "arguments": _object({"city": _text()}, {"unit": {"enum": ["c", "f"]}})}
    ),
    "weather": _object(
        {"temperature": {"type": "number", "minimum": -90, "maximum": 60}, "sky": {"enum": ["clear", "cloudy"]}}
    ),
    "discriminated": {
        "anyOf": [
            _object({"kind": {"const": "circle"}, "radius": {"type": "number", "exclusiveMinimum": 0}}),
            _object({"kind": {"const": "square"}, "side": {"type": "integer", "minimum": 1, "maximum": 9}}),
        ]
    },
    "disjoint_one_of": {"oneOf": [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}]},
    "all_of_integers": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    "all_of_objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
    },
    "prefix_items": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "matrix": {
        "type": "array",
        "items": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 1},
            "minItems": 2,
            "maxItems": 2,
        },
        "minItems": 2,
        "maxItems": 2,
    },
    "multiple_of": {"type": "integer", "multipleOf": 7, "minimum": -50, "maximum": 50},
    "exclusive": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    "narrow_number": {"type": "number", "minimum": 0.25, "maximum": 0.5},
    "negative": {"type": "number", "maximum": -1, "minimum": -1000},
    "min_length": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern_properties": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "optional_only": _object({}, {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {"type": "boolean"}}),
    "annotations": {"title": "T", "description": "says <|im_end|>", "type": "integer", "default": 3, "examples": [4]},
    "definitions": {
        "definitions": {"n": {"type": "integer"}},
        "type": "array",
        "items": {"$ref": "#/definitions/n"},
        "maxItems": 3,
    },
}


class _Generator:
    """Draws schemas of keywords that llguidance supports."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def schema(self, depth: int) -> Schema:
        leaves = (self.string, self.integer, self.number, self.choice, self.simple)
        inner = (self.object, self.object, self.array, self.union, self.with_definition)
        return self.draw.choice(leaves if depth == 0 else (*inner, self.draw.choice(leaves)))(depth)

    def string(self, _: int) -> Schema:
        kind = self.draw.randrange(3)
        if kind == 0:
            return {"type": "string", "pattern": self.draw.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.draw.choice(FORMATS)}
        least = self.draw.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + self.draw.randrange(6)}

    def integer(self, _: int) -> Schema:
        low = self.draw.randrange(-1000, 1000)
        schema: Schema = {"type": "integer", "minimum": low, "maximum": low + self.draw.randrange(1, 3000)}
        if self.draw.random() < 0.3:
            schema["multipleOf"] = self.draw.randrange(1, 4)
            schema["maximum"] = low + 50
        if self.draw.random() < 0.3:
            schema["exclusiveMaximum"] = schema.pop("maximum") + 1
        return schema

    def number(self, _: int) -> Schema:
        low = self.draw.randrange(-400, 400) / 4
        return {"type": "number", "minimum": low, "maximum": low + self.draw.randrange(1, 40) / 4}

    def choice(self, _: int) -> Schema:
        values = self.draw.sample([1, -2.5, "on", "off", "é\n", None, False, [], {"k": [0]}], self.draw.randrange(1, 5))
        return {"const": values[0]} if len(values) == 1 else {"enum": values}

    def simple(self, _: int) -> Schema:
        return {"type": self.draw.choice(["boolean", "null", ["boolean", "null"]])}

    def array(self, depth: int) -> Schema:
        if self.draw.random() < 0.3:
            items = [self.schema(depth - 1) for _ in range(self.draw.randrange(1, 4))]
            return {
                "type": "array",
                "prefixItems": items,
                "items": False,
                "minItems": self.draw.randrange(len(items) + 1),
            }
        least = self.draw.randrange(2)
        most = least + self.draw.randrange(1, 3)
        return {"type": "array", "items": self.schema(depth - 1), "minItems": least, "maxItems": most}

    def object(self, depth: int) -> Schema:
        names = self.draw.sample(WORDS, self.draw.randrange(1, 5))
        properties = {name: self.schema(depth - 1) for name in names}
        required = [name for name in names if self.draw.random() < 0.6]
        schema: Schema = {"type": "object", "properties": properties, "required": required}
        # Other properties' names are free text: bounded by nothing, so allowed rarely.
        schema["additionalProperties"] = {"type": "integer"} if self.draw.random() < 0.1 else False
        return schema

    def union(self, depth: int) -> Schema:
        return {"anyOf": [self.schema(depth - 1) for _ in range(self.draw.randrange(2, 4))]}

    def with_definition(self, depth: int) -> Schema:
        return {
            "$defs": {"part": self.schema(depth - 1)},
            "type": "object",
            "properties": {"first": {"$ref": "#/$defs/part"}, "second": {"$ref": "#/$defs/part"}},
            "required": ["first"],
            "additionalProperties": False,
        }


@cache
def collection() -> dict[str, Any]:
    """name -> schema, `NUM_SCHEMAS` of them. Definitions of drawn schemas lie at the root, where `$ref` finds them."""
    schemas = dict(WRITTEN)
    seed = 0
    while len(schemas) < NUM_SCHEMAS:
        drawn = _Generator(seed).schema(1 + seed % 3)
        if _num_definitions(drawn) == (1 if "$defs" in drawn else 0):
            schemas[f"drawn_{seed}"] = drawn
        seed += 1
    return schemas


def _num_definitions(schema: Any) -> int:
    if isinstance(schema, dict):
        return ("$defs" in schema) + sum(map(_num_definitions, schema.values()))
    return sum(map(_num_definitions, schema)) if isinstance(schema, list) else 0
