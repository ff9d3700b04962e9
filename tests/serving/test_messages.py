"""`/v1/messages` with Anthropic's own client: answers, streams, tools, thinking, refusals, errors in its shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import pytest
import uvloop
from anthropic import Anthropic, AsyncAnthropic
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import compilation_cache  # noqa: F401 - a fixture
from tests.serving.fakes import FakeEngine, Script, async_test, serving
from tests.serving.test_end_to_end import live
from tests.serving.threaded import Server

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "name": "add",
    "description": "adds",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
THOUGHT = "<think>hm</think>Sure."


async def post(client: Any, body: dict[str, Any], path: str = "/v1/messages", **headers: str) -> tuple[int, Any]:
    """The status and the body of an answer."""
    async with client.post(
        path, json={"model": "m", "max_tokens": 200, "messages": HELLO} | body, headers=headers
    ) as r:
        return r.status, await r.json()


async def events_of(client: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; each has its name twice, as Anthropic's have."""
    body = {"model": "m", "max_tokens": 200, "messages": HELLO, "stream": True} | body
    async with client.post("/v1/messages", json=body) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        text = (await response.read()).decode()
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events of a stream make."""
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == ["message_delta", "message_stop"]
    message, partial = events[0]["message"], {}
    for event in events[2:-2]:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert index == len(message["content"]), "blocks come in order, one at a time"
            message["content"].append(event["content_block"])
            partial[index] = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            field = {"text_delta": "text", "thinking_delta": "thinking"}.get(delta["type"])
            if field is None:
                partial[index] += delta["partial_json"]
            else:
                message["content"][index][field] += delta[field]
        elif partial[index]:
            message["content"][index]["input"] = json.loads(partial[index])
    message |= events[-2]["delta"]
    message["usage"] = events[-2]["usage"]
    return message


OPTIONS: dict[str, Any] = {
    "served_model_name": ["m"],
    "tool_call_parser": "hermes",
    "enable_auto_tool_choice": True,
    "reasoning_parser": "qwen3",
}


@settings(max_examples=40)
@given(
    text=st.sampled_from(["", "Hi.", THOUGHT, f"Let me see.{CALL}{CALL}", f"<think>a</think>b{CALL}", CALL, "<tool"]),
    cuts=st.lists(st.integers(1, 12), max_size=12),
)
def test_a_stream_says_what_a_whole_answer_says(text: str, cuts: list[int]) -> None:
    async def both() -> None:
        engine = FakeEngine(Script(answer=text, tokens_per_output=tuple(cuts) or (1,)))
        async with serving(engine, **OPTIONS) as (client, _):
            body = {"tools": [TOOL]}
            _, whole = await post(client, body)
            streamed = joined(await events_of(client, body))
        for message in (whole, streamed):
            message.pop("id")
            for block in message["content"]:
                block.pop("id", None)
        assert streamed == whole

    uvloop.run(both())


@async_test
async def test_blocks() -> None:
    async with serving(FakeEngine(Script(answer=f"<think>hm</think>Wait.{CALL}")), **OPTIONS) as (client, engine):
        _, answer = await post(client, {"tools": [TOOL], "system": "be good"})
        kinds = [block["type"] for block in answer["content"]]
        assert kinds == ["thinking", "text", "tool_use"] and answer["stop_reason"] == "tool_use"
        assert answer["content"][2]["input"] == {"a": 1} and answer["content"][2]["id"].startswith("call_")
        assert answer["usage"]["input_tokens"] > 0 and answer["id"].startswith("msg_")
        _, hidden = await post(client, {"tools": [TOOL], "thinking": {"type": "disabled"}})
        assert [block["type"] for block in hidden["content"]] == ["text", "tool_use"]
        status, count = await post(client, {"system": "be good", "tools": [TOOL]}, "/v1/messages/count_tokens")
        used = answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"]
        assert status == 200 and count == {"input_tokens": used}


@async_test
async def test_ends() -> None:
    engine = FakeEngine(Script(answer="one two three four"))
    async with serving(engine, served_model_name=["m"]) as (client, _):
        _, whole = await post(client, {})
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
        _, cut = await post(client, {"max_tokens": 2})
        assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 2)
        _, stopped = await post(client, {"stop_sequences": ["three"]})
        assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "three")
        assert "three" not in stopped["content"][0]["text"]


@async_test
async def test_a_conversation_with_tools_reaches_the_template() -> None:
    engine = FakeEngine(Script(answer="ok"))
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "add"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "text", "text": "I add."},
                {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "2"}]},
                {"type": "text", "text": "and now?"},
            ],
        },
    ]
    async with serving(engine, served_model_name=["m"]) as (client, _):
        status, answer = await post(client, {"messages": messages, "tools": [TOOL], "tool_choice": {"type": "none"}})
        assert status == 200, answer
        status, _ = await post(client, {"messages": [*HELLO, {"role": "assistant", "content": "It is"}]})
        assert status == 200
    prompt = engine.seen[0][1]["prompt"]
    assert prompt.index("I add.") < prompt.index("2") < prompt.index("and now?")
    assert engine.seen[1][1]["prompt"].rstrip().endswith("It is")


@async_test
async def test_a_broken_call_is_shown_as_it_is() -> None:
    broken = '<tool_call>{"name": "add", "arguments": {"a": 1, oops}}</tool_call>'
    async with serving(FakeEngine(Script(answer=broken)), **OPTIONS) as (client, _):
        _, answer = await post(client, {"tools": [TOOL]})
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert all("oops" in call["input"]["INVALID_JSON"] for call in calls)
    assert calls or "oops" in answer["content"][0]["text"]


@async_test
async def test_turns_in_a_row_are_joined() -> None:
    async with serving(FakeEngine(Script(answer="ok")), served_model_name=["m"]) as (client, engine):
        await post(client, {"messages": [*HELLO, {"role": "user", "content": "again"}]})
        await post(client, {"messages": [{"role": "user", "content": "hello\nagain"}]})
    assert engine.seen[0][1]["prompt"] == engine.seen[1][1]["prompt"]


@async_test
async def test_choices() -> None:
    engine = FakeEngine(Script(answer='[{"name": "add", "parameters": {"a": 3}}]'))
    async with serving(engine, served_model_name=["m"]) as (client, _):
        _, answer = await post(client, {"tools": [TOOL], "tool_choice": {"type": "any"}})
        assert answer["content"][0]["input"] == {"a": 3} and answer["stop_reason"] == "tool_use"
        await post(client, {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}})
        engine.script = Script(answer='{"a": 4}')
        _, named = await post(client, {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "add"}})
        assert named["content"][0]["input"] == {"a": 4}
    schemas = [json.loads(entry[2].structured_outputs.json) for entry in engine.seen]
    assert "maxItems" not in schemas[0] and schemas[1]["maxItems"] == 1


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"model": "other"}, 404, "not_found_error"),
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": []}, 400, "invalid_request_error"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, 400, "invalid_request"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 9}}, 400, "invalid_request_error"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error"),
        ({"tools": [TOOL]}, 400, "invalid_request_error"),  # auto, without --enable-auto-tool-choice
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, 400, "invalid_request_error"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error"),
        ({"temperature": 9}, 400, "invalid_request_error"),
        ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error"),
        ({"container": "x"}, 400, "invalid_request_error"),
        ({"speed": "fast"}, 400, "invalid_request_error"),
        ({"tools": [TOOL | {"strict": True}], "tool_choice": {"type": "any"}}, 400, "invalid_request_error"),
        ({"tools": [TOOL | {"input_schema": {"type": "string"}}], "tool_choice": {"type": "any"}}, 400, "invalid_req"),
    ],
)
@async_test
async def test_refusals(change: dict[str, Any], status: int, kind: str) -> None:
    async with serving(served_model_name=["m"]) as (client, engine):
        found, body = await post(client, change)
        assert found == status and set(body) == {"type", "error"} and body["type"] == "error", body
        assert body["error"]["type"].startswith(kind) and body["error"]["message"]
        assert not engine.seen


@async_test
async def test_the_gate_speaks_the_same_language() -> None:
    async with serving(served_model_name=["m"], api_key=["k"]) as (client, _):
        status, body = await post(client, {})
        assert status == 401 and body["error"]["type"] == "authentication_error"
        status, _ = await post(client, {}, **{"x-api-key": "k"})
        assert status == 200
        async with client.get("/v1/messages", headers={"x-api-key": "k"}) as response:
            assert response.status == 405 and (await response.json())["type"] == "error"
        async with client.post("/v1/completions", json={}) as response:
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}, (
                "OpenAI's stays its own"
            )


def test_anthropics_client() -> None:
    server = Server(FakeEngine(Script(answer=f"Let me see.{CALL}")), **OPTIONS)
    try:
        client = Anthropic(base_url=server.url, api_key="x", max_retries=0)
        message = client.messages.create(model="m", max_tokens=100, messages=HELLO, tools=[TOOL])
        assert [block.type for block in message.content] == ["text", "tool_use"] and message.stop_reason == "tool_use"
        with client.messages.stream(model="m", max_tokens=100, messages=HELLO, tools=[TOOL]) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == "Let me see." and final.content[1].input == {"a": 1}  # type: ignore[union-attr]
        assert final.usage.output_tokens == message.usage.output_tokens
        count = client.messages.count_tokens(model="m", messages=HELLO)
        assert 0 < count.input_tokens <= message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nobody", max_tokens=1, messages=HELLO)
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            client.messages.create(model="m", max_tokens=0, messages=HELLO)
    finally:
        server.close()


def test_a_tiny_model(compilation_cache: str) -> None:  # noqa: F811
    async def run() -> None:
        cache = Path(compilation_cache)
        async with live(cache, process=False) as (url, _), AsyncAnthropic(base_url=url, api_key="x") as client:
            name = (await client.models.list()).data[0].id
            options: Any = {"model": name, "max_tokens": 12, "messages": HELLO}
            options["extra_body"] = {"temperature": 0.0}
            whole = await client.messages.create(**options)
            async with client.messages.stream(**options) as stream:
                streamed = await stream.get_final_message()
            assert [b.text for b in whole.content] == [b.text for b in streamed.content]  # type: ignore[union-attr]
            assert whole.usage.output_tokens == streamed.usage.output_tokens <= 12

    uvloop.run(run())
