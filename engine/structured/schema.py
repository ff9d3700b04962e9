"""Changes to JSON schemas that an option of the request asks for."""

from __future__ import annotations

from typing import Any

# Keywords whose value is a schema, a list of schemas, a dict of schemas.
_ONE = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "contains", "propertyNames")
_JOINED = ("allOf", "anyOf", "oneOf")
_CONDITIONS = ("if", "then", "else", "not")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_PROPERTIES = ("properties", "patternProperties")


def close_objects(schema: Any, *, joined: bool = False) -> Any:
    """The schema with `additionalProperties: false` wherever it lists properties and says nothing about others.

    Only schemas are touched, never data such as `enum`, `const` and `default`. A schema whose properties come from
    several places (allOf, anyOf and the like beside its own properties, `$ref`) is left open: closing one part would
    forbid the properties of the others.

    Args:
        schema: a JSON schema, not changed.
        joined: the schema is one part of such a whole.
    """
    if not isinstance(schema, dict):
        return schema
    lists_properties = any(key in schema for key in _PROPERTIES)
    has_parts = any(key in schema for key in (*_JOINED, *_CONDITIONS, "$ref", "$dynamicRef"))
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _ONE or key == "prefixItems":
            result[key] = [close_objects(v) for v in value] if isinstance(value, list) else close_objects(value)
        elif key in _JOINED and isinstance(value, list):
            inner = joined or lists_properties or key == "allOf" or sum(k in schema for k in _JOINED) > 1
            result[key] = [close_objects(v, joined=inner) for v in value]
        elif key in _CONDITIONS:
            result[key] = close_objects(value, joined=True)
        elif key in _NAMED and isinstance(value, dict):
            result[key] = {name: close_objects(v, joined=key == "dependentSchemas") for name, v in value.items()}
        else:
            result[key] = value
    if lists_properties and not has_parts and not joined and "additionalProperties" not in schema:
        result["additionalProperties"] = False
    return result
