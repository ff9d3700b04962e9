"""The real `openai` client, sync and async, against a server of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from engine.errors import EngineDeadError, RequestFailedError
from serving.endpoints import ALL_ROUTES
from serving.http.app import make_app
from serving.http.context import make_context
from serving.http.server import HttpServer
from serving.http.settings import ServerSettings
from tests.serving.fakes import MODEL, FakeEngine, Script, async_test, tiny_tokenizer
from tests.serving.threaded import Server

ANSWER = "The fox is red."
HELLO: Any = [{"role": "user", "content": "What is the fox?"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    server = Server(FakeEngine(), api_key=["secret"])
    yield server
    server.close()


@pytest.fixture
def server(shared: Server) -> Server:
    shared.engine.script, shared.engine.dead = Script(answer=ANSWER), None
    return shared


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0) as made:
        yield made


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert choice.logprobs is not None and choice.logprobs.content is not None
    text = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content)
    assert text.decode().startswith(ANSWER)


def test_chat_streams(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


def test_the_streaming_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        events = list(stream)
        assert stream.get_final_completion().choices[0].message.content == ANSWER
    assert any(event.type == "content.delta" for event in events)


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="x", logprobs=1, echo=True, max_tokens=50)
    assert answer.choices[0].text == "x" + ANSWER and answer.choices[0].logprobs is not None
    parts = client.completions.create(model=MODEL, prompt=["x", "y"], stream=True, max_tokens=50)
    texts = {0: "", 1: ""}
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == {0: ANSWER, 1: ANSWER}


def test_extra_fields_and_headers(client: OpenAI, server: Server) -> None:
    extra = {"top_k": 3, "return_token_ids": True}
    headers = {"X-Request-Id": "r"}
    answer = client.completions.create(model=MODEL, prompt=[5, 6], extra_body=extra, extra_headers=headers)
    assert answer.id == "cmpl-r" and server.engine.seen[-1][2].top_k == 3
    assert answer.choices[0].token_ids[:3] == tiny_tokenizer().encode(ANSWER, False)[:3]  # type: ignore[attr-defined]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_typed_errors(client: OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt=[5] * 600)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError) as lost:
        client.chat.completions.create(model="gpt-x", messages=HELLO)
    assert lost.value.code == "model_not_found" and lost.value.param == "model"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    server.engine.dead = "gone"
    with pytest.raises(openai.InternalServerError) as dead:
        client.completions.create(model=MODEL, prompt="x")
    assert dead.value.status_code == 503


def test_an_error_in_a_stream_is_raised(client: OpenAI, server: Server) -> None:
    server.engine.script = Script(answer=ANSWER, error=RequestFailedError("a step failed"), error_at=3)
    seen = []
    with pytest.raises(openai.APIError, match="a step failed"):
        for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, stream=True):
            seen.append(chunk)
    assert len(seen) >= 3


def test_retries_succeed_when_the_engine_is_back(server: Server) -> None:
    server.engine.script = Script(answer=ANSWER, error=EngineDeadError("restarting"))
    threading.Timer(0.3, lambda: setattr(server.engine, "script", Script(answer=ANSWER))).start()
    with OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=3) as client:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == ANSWER


@async_test
async def test_async_streams_at_once_and_leaving_one() -> None:
    engine = FakeEngine(Script(answer=ANSWER, delay_s=0.002))
    server = HttpServer(make_app(make_context(engine, ServerSettings(port=0)), ALL_ROUTES))
    url = await server.start()
    async with AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:

        async def one(leaves: bool) -> str:
            text = ""
            async with await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream:
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    if leaves and text:
                        break
            return text

        texts = await asyncio.gather(*[one(number % 4 == 0) for number in range(32)])
    await server.stop()
    assert all(text == ANSWER for number, text in enumerate(texts) if number % 4)
    assert engine.live == {} and len(engine.aborted) == 8
