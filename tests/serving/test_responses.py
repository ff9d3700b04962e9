"""`/v1/responses` with OpenAI's own client: answers, the sequence of events, tools, formats, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from engine.errors import RequestFailedError
from serving.protocol.base import ErrorBody
from serving.protocol.responses import ResponsesResponse
from tests.engine.conftest import compilation_cache  # noqa: F401 - a fixture
from tests.serving.fakes import FakeEngine, Script, async_test, serving
from tests.serving.test_end_to_end import live
from tests.serving.threaded import Server

PATH = "/v1/responses"
TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
OPTIONS: dict[str, Any] = {
    "served_model_name": ["m"],
    "tool_call_parser": "hermes",
    "enable_auto_tool_choice": True,
    "reasoning_parser": "qwen3",
}


async def post(client: Any, body: dict[str, Any]) -> tuple[int, Any]:
    """The status and the body of an answer."""
    async with client.post(PATH, json={"model": "m", "input": "hello"} | body) as response:
        return response.status, await response.json()


async def events_of(client: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, numbered in order."""
    async with client.post(PATH, json={"model": "m", "input": "hello", "stream": True} | body) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        text = (await response.read()).decode()
    found = []
    for number, block in enumerate(text.strip().split("\n\n")):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}" and found[-1]["sequence_number"] == number
    return found


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the deltas of a stream make; each `done` says what its deltas said."""
    items: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind, index = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert index == len(items), "items come in order, one at a time"
            items.append(event["item"] | {"made": ""})
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[index]["id"]
            items[index]["made"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == items[index]["made"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == items[index]["made"]
        elif kind == "output_item.done":
            items[index] = event["item"]
    return items


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(["", "Hi.", "<think>hm</think>Sure.", f"Let me see.{CALL}{CALL}", f"<think>a</think>b{CALL}"]),
    cuts=st.lists(st.integers(1, 12), max_size=12),
)
def test_a_stream_says_what_a_whole_answer_says(text: str, cuts: list[int]) -> None:
    async def both() -> None:
        engine = FakeEngine(Script(answer=text, tokens_per_output=tuple(cuts) or (1,)))
        async with serving(engine, **OPTIONS) as (client, _):
            body = {"tools": [TOOL], "request_id": "same"}
            _, whole = await post(client, body)
            events = await events_of(client, body)
        assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
        assert events[-1]["type"] == "response.completed"
        final = events[-1]["response"]
        assert joined(events) == final["output"]
        for answer in (whole, final):
            ResponsesResponse.model_validate(answer)
            answer.pop("created_at")
            for item in answer["output"]:
                item.pop("call_id", None)
        assert final == whole

    uvloop.run(both())


@async_test
async def test_items() -> None:
    async with serving(FakeEngine(Script(answer=f"<think>hm</think>Wait.{CALL}")), **OPTIONS) as (client, _):
        body = {"tools": [TOOL], "instructions": "be good", "metadata": {"a": "b"}, "temperature": 0.5}
        _, answer = await post(client, body)
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call"]
    reasoning, message, call = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "Wait."
    assert call["name"] == "add" and json.loads(call["arguments"]) == {"a": 1} and call["call_id"].startswith("call_")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert answer["temperature"] == 0.5 and answer["top_p"] == 1.0 and answer["metadata"] == {"a": "b"}
    assert answer["store"] is False and answer["status"] == "completed"


@async_test
async def test_a_cut_answer_is_incomplete() -> None:
    async with serving(FakeEngine(Script(answer="one two three")), served_model_name=["m"]) as (client, _):
        _, answer = await post(client, {"max_output_tokens": 2})
        events = await events_of(client, {"max_output_tokens": 2})
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["type"] == "response.incomplete"


@async_test
async def test_a_conversation_reaches_the_template() -> None:
    engine = FakeEngine(Script(answer="ok"))
    items = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "add"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"role": "user", "content": "and now?"},
    ]
    async with serving(engine, served_model_name=["m"]) as (client, _):
        status, answer = await post(client, {"input": items, "instructions": "sys", "top_k": 7, "seed": 3})
        assert status == 200, answer
    _, prompt, params, _ = engine.seen[0]
    text = prompt["prompt"]
    assert text.index("sys") < text.index("be brief") < text.index("I add.") < text.index("and now?")
    assert params.top_k == 7 and params.seed == 3


@async_test
async def test_formats_and_choices() -> None:
    engine = FakeEngine(Script(answer="{}"))
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    async with serving(engine, served_model_name=["m"]) as (client, _):
        await post(client, {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}})
        await post(client, {"text": {"format": {"type": "json_object"}}})
        _, named = await post(client, {"tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}})
        await post(client, {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False})
    structured = [entry[2].structured_outputs for entry in engine.seen]
    assert json.loads(structured[0].json) == schema and structured[1].json_object is True
    assert json.loads(structured[2].json) == TOOL["parameters"] and json.loads(structured[3].json)["maxItems"] == 1
    assert named["output"][0]["type"] == "function_call" and named["tool_choice"]["name"] == "add"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"store": True}, 400, "store"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"background": True}, 400, "background"),
        ({"conversation": "c"}, 400, "conversation"),
        ({"include": ["x"]}, 400, "include"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools"),
        ({"tools": [TOOL]}, 400, "tool_choice"),  # auto, without --enable-auto-tool-choice
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"input": []}, 400, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, 400, "input"),
        ({"input": [{"type": "function_call", "name": "add"}]}, 400, "input"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"temperature": 9}, 400, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text"),
        ({"text": {"verbosity": "low"}}, 400, "text"),
        ({"reasoning": {"summary": "auto"}}, 400, "reasoning"),
    ],
)
@async_test
async def test_refusals(change: dict[str, Any], status: int, param: str) -> None:
    async with serving(served_model_name=["m"]) as (client, engine):
        found, body = await post(client, change)
        assert found == status and ErrorBody.model_validate(body).error.param == param, body
        assert not engine.seen


def test_openais_client() -> None:
    server = Server(FakeEngine(Script(answer=f"Let me see.{CALL}")), **OPTIONS)
    try:
        client = OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        answer = client.responses.create(model="m", input="hello", tools=[TOOL])
        assert answer.output_text == "Let me see." and answer.output[1].type == "function_call"
        with client.responses.stream(model="m", input="hello", tools=[TOOL]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        assert final.output_text == "Let me see." and final.usage == answer.usage
        with pytest.raises(NotFoundError):
            client.responses.retrieve("resp_1")
        with pytest.raises(NotFoundError):
            client.responses.delete("resp_1")
        with pytest.raises(BadRequestError) as caught:
            client.responses.create(model="m", input="hello", max_output_tokens=0)
        assert caught.value.param == "max_output_tokens"
    finally:
        server.close()


@async_test
async def test_a_failure_ends_the_stream_with_an_error() -> None:
    engine = FakeEngine(Script(answer="one two three four", error=RequestFailedError("a step failed"), error_at=2))
    async with serving(engine, served_model_name=["m"]) as (client, _):
        events = await events_of(client, {})
    assert events[-1]["type"] == "error" and events[-1]["message"] and events[-1]["code"] == "500"


def test_a_tiny_model(compilation_cache: str) -> None:  # noqa: F811
    async def run() -> None:
        cache = Path(compilation_cache)
        async with live(cache, process=False) as (url, _), AsyncOpenAI(base_url=url + "/v1", api_key="x") as client:
            name = (await client.models.list()).data[0].id
            options: Any = {"model": name, "max_output_tokens": 12, "input": "hello there", "temperature": 0.0}
            whole = await client.responses.create(**options)
            last = [event async for event in await client.responses.create(**options, stream=True)][-1]
            streamed = last.response
            assert whole.output_text == streamed.output_text
            assert whole.usage is not None and streamed.usage is not None
            assert whole.usage.output_tokens == streamed.usage.output_tokens <= 12

    uvloop.run(run())
