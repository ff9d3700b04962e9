"""Every row of the table of errors, with status, type, param and code; always in one body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import EngineDeadError, InvalidRequestError, QueueFullError, RequestFailedError
from serving.http.errors import ApiError, fault_of, hide_paths
from serving.protocol.base import ErrorBody
from tests.serving.fakes import FakeEngine, Script, async_test, post, serving

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # out of range, or of the wrong type: (endpoint, body, param)
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt"),
    (COMPLETIONS, {"prompt": [320]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "min_tokens": 17}, "min_tokens"),
    (COMPLETIONS, {"prompt": "x", "temperature": -0.1}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": 2.1}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0.0}, "top_p"),
    (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k"),
    (COMPLETIONS, {"prompt": "x", "min_p": 1.5}, "min_p"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 2.5}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "x", "frequency_penalty": -2.5}, "frequency_penalty"),
    (COMPLETIONS, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "x", "n": 16385}, "n"),
    (COMPLETIONS, {"prompt": "x", "n": 2, "temperature": 0}, "n"),
    (COMPLETIONS, {"prompt": ["x"] * 1024, "n": 17}, "n"),
    (COMPLETIONS, {"prompt": "x", "seed": 2**63}, "seed"),
    (COMPLETIONS, {"prompt": "x", "seed": 10**400}, "seed"),
    (COMPLETIONS, {"prompt": "x", "temperature": 10**400}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop": [1]}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [320]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    (COMPLETIONS, {"prompt": "x", "bad_words": [""]}, "bad_words"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"320": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "logprobs": -2}, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (COMPLETIONS, {"prompt": "x", "priority": 1}, "priority"),
    (COMPLETIONS, {"prompt": "x", "request_id": ""}, "request_id"),
    (COMPLETIONS, {"prompt": "x", "request_id": "a\nb"}, "request_id"),
    (COMPLETIONS, {"prompt": "x", "cache_salt": ""}, "cache_salt"),
    (COMPLETIONS, {"prompt": "x", "metadata": {"a": 1}}, "metadata"),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "yaml"}}, "response_format"),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
    # features that are not there
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
    (COMPLETIONS, {"prompt": "x", "use_beam_search": True}, "use_beam_search"),
    (COMPLETIONS, {"prompt": "x", "length_penalty": 0.5}, "length_penalty"),
    (COMPLETIONS, {"prompt": "x", "guided_json": {}}, "guided_json"),
    (COMPLETIONS, {"prompt": "x", "prompt_embeds": "AA"}, "prompt_embeds"),
    (COMPLETIONS, {"prompt": "x", "store": True}, "store"),
    (COMPLETIONS, {"prompt": "x", "service_tier": "flex"}, "service_tier"),
    (CHAT, {"messages": HELLO, "functions": []}, "functions"),
    (CHAT, {"messages": HELLO, "modalities": ["audio"]}, "modalities"),
    (CHAT, {"messages": HELLO, "web_search_options": {}}, "web_search_options"),
    # chat
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}, "messages"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    (CHAT, {"messages": HELLO, "tools": []}, "tools"),
    (CHAT, {"messages": HELLO, "tools": TOOLS}, "tool_choice"),
    (
        CHAT,
        {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice",
    ),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    (
        CHAT,
        {"messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
        "tool_choice",
    ),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
@async_test
async def test_a_wrong_body_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    async with serving() as (client, engine):
        status, answer = await post(client, path, body)
        # stream_options is wrong because there is no stream
        streamed, again = await post(client, path, body if "stream_options" in body else {**body, "stream": True})
        assert (await client.get("/health")).status == 200
    assert status == streamed == 400 and engine.seen == [] and engine.live == {}
    error = ErrorBody.model_validate(answer).error
    assert (error.type, error.param) == ("BadRequestError", param)
    assert again == answer, "a stream is refused before it begins"
    assert len(error.message) > 10


@async_test
async def test_a_prompt_that_is_too_long() -> None:
    async with serving() as (client, _):
        answers = [
            await post(client, COMPLETIONS, {"prompt": [5] * 512}),
            await post(client, COMPLETIONS, {"prompt": "x" * 300_000}),
            await post(client, CHAT, {"messages": [{"role": "user", "content": "hello " * 400}]}),
        ]
    for status, body in answers:
        assert status == 400
        assert body["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 512 tokens" in body["error"]["message"]


@async_test
async def test_unknown_models_paths_and_methods() -> None:
    async with serving(served_model_name=["a", "b"]) as (client, _):
        status, body = await post(client, COMPLETIONS, {"model": "c", "prompt": "x"})
        assert (status, body["error"]["type"], body["error"]["param"]) == (404, "NotFoundError", "model")
        assert "`a`, `b`" in body["error"]["message"] and body["error"]["code"] == "model_not_found"
        _, body = await post(client, COMPLETIONS, {"model": "b", "prompt": "x"})
        assert body["model"] == "b"
        status, body = await post(client, "/v1/nothing", {})
        assert status == 404 and "/v1/nothing" in body["error"]["message"]
        async with client.get(COMPLETIONS) as response:
            assert response.status == 405 and response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["type"] == "MethodNotAllowedError"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nope",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a \\ud800"}',
        b"[]",
    ]
    + [b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"a":' * 5000 + b"1" + b"}" * 5000],
)
@async_test
async def test_what_is_not_json(data: bytes) -> None:
    async with (
        serving() as (client, _),
        client.post(COMPLETIONS, data=data, headers={"Content-Type": "application/json"}) as response,
    ):
        assert response.status == 400
        ErrorBody.model_validate(await response.json())


@async_test
async def test_other_content_types_and_large_bodies() -> None:
    async with serving(max_request_bytes=1000) as (client, _):
        async with client.post(COMPLETIONS, data="prompt=x") as response:
            assert response.status == 400
            assert "application/json" in (await response.json())["error"]["message"]
        status, body = await post(client, COMPLETIONS, {"prompt": "x" * 1000})
        assert (status, body["error"]["type"]) == (413, "RequestTooLargeError")

        async def pieces() -> Any:
            for _ in range(20):
                yield b"x" * 100

        headers = {"Content-Type": "application/json"}
        async with client.post(COMPLETIONS, data=pieces(), headers=headers) as response:
            assert response.status == 413, "also where the length is not told"


@async_test
async def test_many_faults_are_cut() -> None:
    messages = [{"role": 1, "content": "y" * 5000}] * 30
    async with serving() as (client, _):
        status, body = await post(client, CHAT, {"messages": messages, "temperature": "z" * 5000})
    lines = body["error"]["message"].splitlines()
    assert status == 400 and len(lines) == 11 and lines[-1] == "… and 21 more."
    assert max(map(len, lines)) < 320


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFullError("the queue is full"), 503, "ServiceUnavailableError"),
        (EngineDeadError("the engine is gone"), 503, "ServiceUnavailableError"),
        (RequestFailedError("a step failed"), 500, "InternalServerError"),
        (InvalidRequestError("no", "seed"), 400, "BadRequestError"),
        (ValueError("secret"), 500, "InternalServerError"),
    ],
)
@async_test
async def test_faults_of_the_engine(error: Exception, status: int, kind: str) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": "x"}),
        (CHAT, {"messages": HELLO}),
        (COMPLETIONS, {"prompt": ["a", "b"]}),
    ):
        async with serving(FakeEngine(Script(error=error))) as (client, engine):
            for stream in (False, True):
                async with client.post(path, json={**body, "stream": stream}) as response:
                    assert response.status == status
                    assert ("Retry-After" in response.headers) == (status == 503)
                    text = (await response.json())["error"]
                assert text["type"] == kind and "secret" not in text["message"]
            assert engine.live == {}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@async_test
async def test_a_fault_inside_a_stream_ends_it(path: str) -> None:
    engine = FakeEngine(Script(error=RequestFailedError("a step failed"), error_at=3))
    async with serving(engine) as (client, _):
        body = {"prompt": "x", "messages": HELLO, "stream": True}
        async with client.post(path, json=body) as response:
            assert response.status == 200
            events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert (error["message"], error["type"], error["code"]) == ("a step failed", "InternalServerError", 500)
    assert len(events) > 4, "what came before is kept"


@async_test
async def test_a_dead_engine_is_not_healthy() -> None:
    engine = FakeEngine(dead="the engine process ended")
    async with serving(engine) as (client, _):
        for path in ("/health", "/ping"):
            async with client.get(path) as response:
                assert response.status == 503
                assert "process ended" in (await response.json())["error"]["message"]
        engine.dead = None
        assert (await client.get("/health")).status == 200


def test_messages_show_no_paths() -> None:
    shown = "cannot read /root/.cache/quire/models/x.gguf: or '/home/a b/c', see /v1/models"
    assert hide_paths(shown) == "cannot read <path>: or '<path> b/c', see /v1/models"
    assert "/tmp/" not in fault_of(InvalidRequestError("bad /tmp/secret/file")).message
    assert fault_of(ApiError(400, "x" * 10_000)).message.endswith("…")
