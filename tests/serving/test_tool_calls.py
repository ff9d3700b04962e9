"""Tools and reasoning through `/v1/chat/completions`: each format, whole and streamed, and enforced choices."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.fakes import FakeEngine, Script, async_test, serving
from tests.serving.test_chat import HELLO, PATH, TOOL, joined, post, stream

ARGUMENTS = {"a": 1, "b": [2, {"c": "}"}]}
CALLS = {
    "hermes": 'Let me see.<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call>',
    "llama3_json": '{"name": "add", "parameters": %s}',
    "mistral": 'Let me see.[TOOL_CALLS][{"name": "add", "arguments": %s}]',
    "pythonic": "[add(a=1, b=[2, {'c': '}'}])]",
}
SETTINGS: dict[str, Any] = {"enable_auto_tool_choice": True}


async def both(engine: FakeEngine, body: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice of a whole answer, and what a stream of the same adds up to."""
    async with serving(engine, **settings) as (client, _):
        status, answer = await post(client, PATH, body)
        assert status == 200, answer
        return answer["choices"][0], joined(await stream(client, PATH, body))[0]


@pytest.mark.parametrize("name", CALLS)
@async_test
async def test_formats(name: str) -> None:
    text = CALLS[name] % json.dumps(ARGUMENTS) if "%s" in CALLS[name] else CALLS[name]
    body = {"messages": HELLO, "tools": [TOOL]}
    engine = FakeEngine(Script(answer=text))
    choice, streamed = await both(engine, body, tool_call_parser=name, **SETTINGS)
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert choice["finish_reason"] == streamed["finish_reason"] == "tool_calls"
    assert (choice["message"]["content"] or "").strip() == ("Let me see." if text.startswith("Let") else "")
    assert streamed["content"] == (choice["message"]["content"] or "")
    assert streamed["calls"][0]["arguments"] == call["function"]["arguments"]
    # The marks may be special tokens: the engine must show them.
    assert [params.skip_special_tokens for _, _, params in seen(engine)] == [name == "pythonic"] * 2


def seen(engine: FakeEngine) -> list[tuple[Any, Any, Any]]:
    """(id, prompt, parameters) of what the engine was asked."""
    return [(entry[0], entry[1], entry[2]) for entry in engine.seen]


@async_test
async def test_required_is_enforced_by_a_schema() -> None:
    text = json.dumps([{"name": "add", "parameters": {"a": 1}}, {"name": "add", "parameters": {"a": 2}}])
    engine = FakeEngine(Script(answer=text))
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": "required"}
    choice, streamed = await both(engine, body)  # no parser is needed for it
    found = [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert found == [{"a": 1}, {"a": 2}] and choice["message"]["content"] is None
    assert [json.loads(streamed["calls"][i]["arguments"]) for i in (0, 1)] == found
    structured = seen(engine)[0][2].structured_outputs
    schema = json.loads(structured.json)
    assert schema["type"] == "array" and schema["$defs"]["tool0"] == TOOL["function"]["parameters"]
    assert "maxItems" not in schema
    await both(engine, body | {"parallel_tool_calls": False})
    assert json.loads(seen(engine)[-1][2].structured_outputs.json)["maxItems"] == 1


@async_test
async def test_a_named_function_is_enforced_by_its_arguments() -> None:
    engine = FakeEngine(Script(answer='{"a": 7}'))
    named = {"type": "function", "function": {"name": "add"}}
    choice, streamed = await both(engine, {"messages": HELLO, "tools": [TOOL], "tool_choice": named})
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 7}'}
    assert streamed["calls"][0]["arguments"] == '{"a": 7}'
    assert json.loads(seen(engine)[0][2].structured_outputs.json) == TOOL["function"]["parameters"]


@async_test
async def test_choice_none_shows_calls_as_text() -> None:
    engine = FakeEngine(Script(answer=CALLS["hermes"] % "{}"))
    body = {"messages": HELLO, "tools": [TOOL], "tool_choice": "none"}
    choice, _ = await both(engine, body, tool_call_parser="hermes", **SETTINGS)
    assert "<tool_call>" in choice["message"]["content"] and "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("shows", [True, False])
@async_test
async def test_reasoning(shows: bool) -> None:
    engine = FakeEngine(Script(answer="<think>\nhm, 6 * 7\n</think>\n\n42"))
    body = {"messages": HELLO, "include_reasoning": shows}
    choice, streamed = await both(engine, body, reasoning_parser="qwen3")
    assert choice["message"]["content"] == streamed["content"] == "42"
    assert choice["message"].get("reasoning", "") == streamed["reasoning"] == ("hm, 6 * 7" if shows else "")


@async_test
async def test_reasoning_comes_before_calls() -> None:
    text = '<think>add them</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    body = {"messages": HELLO, "tools": [TOOL]}
    choice, streamed = await both(
        FakeEngine(Script(answer=text)), body, tool_call_parser="hermes", reasoning_parser="qwen3", **SETTINGS
    )
    assert choice["message"]["reasoning"] == streamed["reasoning"] == "add them"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"tool_choice": "auto"}, {}),
        ({}, {}),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, {}),
        ({"tool_choice": "required", "structured_outputs": {"regex": "a"}}, {}),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, {}),
    ],
)
@async_test
async def test_faults(change: dict[str, Any], settings: dict[str, Any]) -> None:
    async with serving(**settings) as (client, engine):
        status, answer = await post(client, PATH, {"messages": HELLO, "tools": [TOOL]} | change)
        assert status == 400 and answer["error"]["param"] == "tool_choice", answer
        assert not engine.seen
