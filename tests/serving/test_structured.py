"""Structured output: both ways to ask reach the engine as the same thing."""

from __future__ import annotations

from typing import Any

import pytest

from engine.structured.params import StructuredOutputsParams
from tests.serving.fakes import async_test, post, serving

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
ASKED: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": FORMAT}, {"json": SCHEMA}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, {"json_object": True}),
    ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
    ({"structured_outputs": {"json": SCHEMA}, "response_format": {"type": "text"}}, {"json": SCHEMA}),
]
REFUSED: list[dict[str, Any]] = [
    {"structured_outputs": {}},
    {"structured_outputs": {"regex": "a", "choice": ["a"]}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"json": "no json"}},
    {"structured_outputs": {"other": 1}},
    {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema"}},
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("body", "expected"), ASKED)
@async_test
async def test_what_is_asked_reaches_the_engine(
    path: str, body: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    async with serving() as (client, engine):
        status, answer = await post(
            client, path, {"prompt": "x", "messages": [{"role": "user", "content": "x"}], **body}
        )
    assert status == 200, answer
    made = engine.seen[0][2].structured_outputs
    assert made == (None if expected is None else StructuredOutputsParams(**expected))


@pytest.mark.parametrize("body", REFUSED)
@async_test
async def test_what_cannot_be_is_refused(body: dict[str, Any]) -> None:
    async with serving() as (client, engine):
        status, answer = await post(client, "/v1/completions", {"prompt": "x", **body})
    assert status == 400 and engine.seen == []
    assert answer["error"]["param"] in ("structured_outputs", "response_format")
