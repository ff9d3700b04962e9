"""Tool choices that leave the model no choice, as JSON schemas that the engine holds the answer to.

"required" becomes an array of calls, as vLLM has it: `[{"name": "f", "parameters": {…}}, …]`. A named function becomes
its bare arguments. Both say the same whatever format the model was trained on; the parsers that read them are in
`tools/forced.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Schema = dict[str, Any]

# OpenAI: without `parameters`, a function has none.
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_DATA = frozenset({"const", "enum", "default", "example", "examples"})  # keywords whose values are no schemas
# Keywords whose values are schemas by name; there any name is just a name.
_BY_NAME = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})


def schema_of_named(function: Mapping[str, Any]) -> Schema:
    """The schema of an answer that is the arguments of one function.

    Args:
        function: OpenAI's description of it: `name`, `parameters` (a JSON schema) …
    """
    return dict(_parameters(function))


def schema_of_required(functions: Sequence[Mapping[str, Any]], *, parallel: bool) -> Schema:
    """The schema of an answer that is an array of calls.

    Args:
        functions: at least one.
        parallel: False = exactly one call, else one or more.
    """
    definitions, calls = {}, []
    for index, function in enumerate(functions):
        # Each schema becomes a definition, so that its own "#/…" references can be led there.
        definitions[f"tool{index}"] = _rebase(_parameters(function), f"#/$defs/tool{index}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "parameters": {"$ref": f"#/$defs/tool{index}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: Schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    if not parallel:
        schema["maxItems"] = 1
    return schema


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    if not parameters:
        return _NO_PARAMETERS
    # Arguments are an object, also where the schema does not say so.
    return parameters if "type" in parameters or "$ref" in parameters else {"type": "object", **parameters}


def _rebase(schema: Any, base: str) -> Any:
    """A copy whose references to its own root lead to `base`."""
    if isinstance(schema, list):
        return [_rebase(item, base) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            copy[key] = f"{base}{value[1:]}"
        elif key in _BY_NAME and isinstance(value, Mapping):
            copy[key] = {name: _rebase(item, base) for name, item in value.items()}
        else:
            copy[key] = value if key in _DATA else _rebase(value, base)
    return copy
