"""Keys, origins, TLS, sockets, limits, disconnects, slow clients, and the way down."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.errors import ConfigError, RequestFailedError
from serving.endpoints import ALL_ROUTES
from serving.http.app import make_app
from serving.http.context import CONTEXT, make_context
from serving.http.observer import RequestEnd, RequestStart
from serving.http.server import HttpServer
from serving.http.settings import ServerSettings
from serving.http.traffic import Traffic
from tests.serving.fakes import FakeEngine, Script, async_test, post, serving, until

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}


class Listening:
    """A server on a socket of its own, as `quire serve` has it."""

    def __init__(self, engine: FakeEngine, server: HttpServer, url: str, traffic: Traffic) -> None:
        self.engine, self.server, self.url, self.traffic = engine, server, url, traffic
        self.stopped = False

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        if not self.stopped:
            self.stopped = True
            await self.server.stop(hurry)


@asynccontextmanager
async def listening(engine: FakeEngine | None = None, **settings: Any) -> AsyncIterator[Listening]:
    """Listen until the end of the block."""
    engine = engine or FakeEngine()
    app = make_app(make_context(engine, ServerSettings(**{"port": 0, **settings})), ALL_ROUTES)
    server = HttpServer(app)
    live = Listening(engine, server, await server.start(), app[CONTEXT].traffic)
    try:
        yield live
    finally:
        await live.stop()


async def raw(port: int, data: bytes, *, wait: float = 5.0) -> bytes:
    """Send bytes, return all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(wait):
            return await reader.read()
    finally:
        writer.close()


def http_post(body: Any, *, path: str = COMPLETIONS, more: str = "Connection: close\r\n") -> bytes:
    """The bytes of a request."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{more}"
    return head.encode() + b"\r\n" + data


# keys and origins


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "one"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer one"}, 200),
        ({"Authorization": "bearer two"}, 200),
        ({"X-Api-Key": "two"}, 200),
    ],
)
@async_test
async def test_keys_guard_the_api(headers: dict[str, str], status: int) -> None:
    async with serving(api_key=["one", "two"]) as (client, engine):
        async with client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers) as response:
            assert response.status == status
            body = await response.json()
        assert (await client.get("/v1/models", headers=headers)).status == status
        for path in ("/health", "/version", "/openapi.json"):
            assert (await client.get(path)).status == 200
    assert len(engine.seen) == (1 if status == 200 else 0)
    if status == 401:
        assert body["error"]["code"] == "invalid_api_key" and "one" not in body["error"]["message"]


@async_test
async def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "a,b")
    async with serving() as (client, _):
        assert (await client.get("/v1/models")).status == 401
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer b"})).status == 200


@async_test
async def test_origins_of_pages() -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with serving(allowed_origins=["https://a.example"], api_key=["k"]) as (client, _):
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            async with client.options(COMPLETIONS, headers={"Origin": origin, **asks}) as response:
                assert response.status == (204 if allowed else 401), "a preflight carries no key"
                assert (response.headers.get("Access-Control-Allow-Origin") == origin) == allowed
            async with client.post(
                COMPLETIONS, json={"prompt": "x", "stream": True}, headers={"Origin": origin, "X-Api-Key": "k"}
            ) as response:
                assert response.status == 200
                assert (response.headers.get("Access-Control-Allow-Origin") == origin) == allowed
    for origins, shown in ((["*"], "*"), (None, None)):
        async with serving(allowed_origins=origins) as (client, _):
            response = await client.get("/health", headers={"Origin": "https://b.example"})
            assert response.headers.get("Access-Control-Allow-Origin") == shown


@pytest.mark.parametrize(
    "path", ["/%76%31/models", "//v1/models", "/v1%2Fmodels", "/./v1/models", "/x/../v1/models", "/V1/models"]
)
@async_test
async def test_no_spelling_of_a_path_gets_around_the_key(path: str) -> None:
    async with listening(api_key=["k"]) as live:
        answer = await raw(live.port, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"401", b"404"), answer


@async_test
async def test_head_is_get_without_the_body() -> None:
    async with serving() as (client, _), client.head("/health") as response:
        assert response.status == 200 and await response.read() == b""


# sockets


@async_test
async def test_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    async with listening(ssl_keyfile=str(key), ssl_certfile=str(cert)) as live:
        assert live.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        async with aiohttp.ClientSession() as session:
            async with session.post(live.url + COMPLETIONS, json={"prompt": "x"}, ssl=trusted) as response:
                assert response.status == 200
            with pytest.raises(aiohttp.ClientError):
                await session.get(f"http://127.0.0.1:{live.port}/health")


@async_test
async def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "x.pem"
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match="ssl_certfile"):
        async with listening(ssl_keyfile=str(file), ssl_certfile=str(file)):
            pass


@async_test
async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "quire.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)  # what a killed server leaves
    async with listening(uds=path) as live:
        assert live.url == f"unix:{path}"
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session:
            assert (await session.post("http://x/v1/completions", json={"prompt": "x"})).status == 200
        with pytest.raises(ConfigError, match="in use"):
            async with listening(uds=path):
                pass
    assert not Path(path).exists()
    Path(path).write_text("mine")
    with pytest.raises(ConfigError, match="no socket"):
        async with listening(uds=path):
            pass
    assert Path(path).read_text() == "mine"


@async_test
async def test_a_port_in_use() -> None:
    async with listening() as live:
        with pytest.raises(ConfigError, match=f"port {live.port}: the address is in use"):
            async with listening(port=live.port):
                pass


# limits


@async_test
async def test_too_many_requests() -> None:
    engine = FakeEngine(Script(hold=asyncio.Event()))
    async with serving(engine, max_concurrent_requests=2) as (client, _):
        running = [asyncio.create_task(post(client, COMPLETIONS, BODY)) for _ in range(2)]
        await until(lambda: len(engine.live) == 2)
        async with client.post(COMPLETIONS, json=BODY) as response:
            assert response.status == 503 and response.headers["Retry-After"] == "1"
        assert (await (await client.get("/load")).json()) == {"server_load": 2}
        engine.script.hold.set()  # type: ignore[union-attr]
        assert [status for status, _ in await asyncio.gather(*running)] == [200, 200]
        assert (await post(client, COMPLETIONS, BODY))[0] == 200


@async_test
async def test_a_request_that_takes_too_long() -> None:
    async with serving(FakeEngine(Script(delay_s=0.02)), request_timeout=0.2) as (client, engine):
        status, body = await post(client, COMPLETIONS, BODY)
        assert (status, body["error"]["type"]) == (504, "TimeoutError")
        async with client.post(COMPLETIONS, json={**BODY, "stream": True}) as response:
            events = (await response.text()).split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == 504
        assert len(events) > 4
        await until(lambda: not engine.live)
    assert len(engine.aborted) == 2


@async_test
async def test_a_client_that_leaves_is_aborted_at_once() -> None:
    engine = FakeEngine(Script(delay_s=0.01))
    async with listening(engine) as live:
        for stream in (False, True):
            reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
            writer.write(http_post({**BODY, "stream": stream}))
            await until(lambda: engine.live)
            if stream:
                assert b"data:" in await reader.readuntil(b"data:")
            begun = time.monotonic()
            writer.transport.abort()
            await until(lambda: not engine.live)
            assert time.monotonic() - begun < 0.5
        await until(lambda: live.traffic.num_live == 0)
    assert len(engine.aborted) == 2


@async_test
async def test_headers_and_bodies_must_come_in_time() -> None:
    async with listening(receive_timeout=0.3) as live:
        begun = time.monotonic()
        silent, partial, body = await asyncio.gather(
            raw(live.port, b""),
            raw(live.port, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"),
            raw(live.port, http_post(BODY)[:-5]),
        )
        assert time.monotonic() - begun < 3
        for answer in (silent, partial, body):
            assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        answer_of_slow = asyncio.create_task(reader.read())
        writer.write(b"GET /health HTTP/1.1\r\nX-A: ")
        while not answer_of_slow.done():  # a byte at a time, for ever
            writer.write(b"b")
            await asyncio.sleep(0.02)
        assert b"408" in answer_of_slow.result()
        writer.close()
        # A connection that is kept alive longer than that between two requests is not cut.
        async with aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.get(live.url + "/health") as response:
                    assert response.status == 200
                await asyncio.sleep(0.4)


@async_test
async def test_a_client_that_does_not_read_is_given_up() -> None:
    engine = FakeEngine(Script(answer="x" * 5_000, tokens_per_output=(64,)), max_model_len=20_000)
    body = {"prompt": ["x"] * 64, "stream": True, "max_tokens": 5000, "logprobs": 20}
    async with listening(engine, send_timeout=0.3) as live:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port, limit=1024)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        writer.write(http_post(body))
        await reader.readuntil(b"data:")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: live.traffic.num_live == 0)
        assert not engine.live and engine.aborted
        writer.close()


# the way down


@async_test
async def test_running_requests_end_before_the_server_does() -> None:
    engine = FakeEngine(Script(hold=asyncio.Event()))
    async with listening(engine) as live, aiohttp.ClientSession() as session:
        stream = asyncio.create_task(_text(session, live.url, {"prompt": "x", "stream": True, "max_tokens": 4}))
        async with session.get(live.url + "/health") as response:
            assert response.status == 200
        await until(lambda: engine.live)
        asyncio.get_running_loop().call_later(0.3, engine.script.hold.set)  # type: ignore[union-attr]
        stopping = asyncio.create_task(live.stop())
        await until(lambda: live.traffic.draining)
        async with session.get(live.url + "/health") as response:  # on the connection that is open
            assert response.status == 503
        with pytest.raises(ConnectionError):
            await raw(live.port, b"GET /health HTTP/1.1\r\n\r\n")
        text = await stream
        await stopping
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
    assert engine.aborted == []


@pytest.mark.parametrize("hurried", [False, True])
@async_test
async def test_what_does_not_end_is_aborted_with_a_last_event(hurried: bool) -> None:
    engine = FakeEngine(Script(hold=asyncio.Event()))
    timeout = 30.0 if hurried else 0.2
    async with listening(engine, shutdown_timeout=timeout) as live, aiohttp.ClientSession() as session:
        stream = asyncio.create_task(_text(session, live.url, {"prompt": "x", "stream": True}))
        whole = asyncio.create_task(_text(session, live.url, {"prompt": ["x", "y"]}))
        await until(lambda: len(engine.live) == 3)
        hurry, begun = asyncio.Event(), time.monotonic()
        if hurried:
            asyncio.get_running_loop().call_later(0.2, hurry.set)
        await live.stop(hurry)
        assert 0.15 < time.monotonic() - begun < 3
    events = (await stream).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    assert [c["finish_reason"] for c in json.loads(await whole)["choices"]] == ["abort", "abort"]
    assert engine.live == {}


async def _text(session: aiohttp.ClientSession, url: str, body: Any) -> str:
    async with session.post(url + COMPLETIONS, json=body) as response:
        assert response.status == 200
        return await response.text()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"port": 70000}, "port"),
        ({"ssl_keyfile": "x"}, "ssl_certfile"),
        ({"receive_timeout": 0.0}, "receive_timeout"),
        ({"send_timeout": float("nan")}, "send_timeout"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout"),
        ({"request_timeout": 0.0}, "request_timeout"),
        ({"max_request_bytes": 0}, "max_request_bytes"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests"),
        ({"enable_auto_tool_choice": True}, "tool_call_parser"),
        ({"api_key": [""]}, "api_key"),
        ({"root_path": "x"}, "root_path"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ServerSettings(**settings)


@async_test
async def test_requests_are_logged_without_their_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "quire.serving"):
        for wanted in (False, True):
            caplog.clear()
            async with serving(enable_log_requests=wanted) as (client, _):
                await post(client, COMPLETIONS, {"prompt": "secret", "request_id": "r", "top_k": 7})
            text = caplog.text
            assert ("cmpl-r" in text and "top_k=7" in text) == wanted and "secret" not in text


@async_test
async def test_an_access_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "quire.access"):
        for wanted in (False, True):
            caplog.clear()
            async with listening(access_log=wanted) as live:
                await raw(live.port, http_post({"prompt": "secret"}))
            assert ("POST /v1/completions" in caplog.text) == wanted and "secret" not in caplog.text


@async_test
async def test_a_live_id_gets_a_suffix_in_the_engine() -> None:
    engine = FakeEngine(Script(hold=asyncio.Event()))
    async with serving(engine) as (client, _):
        body = {"prompt": "x", "request_id": "same"}
        both = [asyncio.create_task(post(client, COMPLETIONS, body)) for _ in range(2)]
        await until(lambda: len(engine.live) == 2)
        engine.script.hold.set()  # type: ignore[union-attr]
        answers = await asyncio.gather(*both)
    assert [(status, answer["id"]) for status, answer in answers] == [(200, "cmpl-same")] * 2


class Notes:
    """An observer that writes down."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def on_start(self, start: RequestStart) -> None:
        self.lines.append(("start", start.request_id, start.endpoint, start.num_prompt_tokens, start.trace_parent))

    def on_tokens(self, request_id: str, num_tokens: int, time: float) -> None:
        self.lines.append(("tokens", request_id, num_tokens))

    def on_end(self, end: RequestEnd) -> None:
        first = None if end.first_token_s is None else end.first_token_s <= end.e2e_s
        self.lines.append(("end", end.request_id, end.finish_reasons, end.status, end.num_output_tokens, first))

    def on_rejected(self, endpoint: str, status: int, reason: str) -> None:
        self.lines.append(("rejected", endpoint, status))


@async_test
async def test_observers_hear_of_every_request_once() -> None:
    notes, engine = Notes(), FakeEngine(Script(answer="ab", tokens_per_output=(2,)))
    async with serving(engine, prepare=lambda c: replace(c, observers=(notes,))) as (client, _):
        trace = {"traceparent": "00-1-2-01"}
        await client.post(COMPLETIONS, json={"prompt": [5, 6], "request_id": "a", "max_tokens": 3}, headers=trace)
        await post(client, COMPLETIONS, {"prompt": [5] * 600})
        await post(client, COMPLETIONS, {"prompt": [5], "top_p": 7})
        await post(client, COMPLETIONS, {"model": "nobody", "prompt": [5]})
        engine.script = Script(error=RequestFailedError("step"), error_at=1)
        async with client.post(COMPLETIONS, json={"prompt": [5], "request_id": "b", "stream": True}) as response:
            await response.read()
        engine.script = Script(delay_s=0.01)
        async with client.post(COMPLETIONS, json={**BODY, "request_id": "c", "stream": True}) as response:
            await response.content.readline()
            response.close()
        await until(lambda: not engine.live)
        await until(lambda: notes.lines[-1][0] == "end")
    lines = [line for line in notes.lines if line[0] != "tokens"]
    assert lines[:2] == [
        ("start", "cmpl-a", COMPLETIONS, 2, "00-1-2-01"),
        ("end", "cmpl-a", ("stop",), 200, 3, True),
    ]
    assert lines[2:5] == [
        ("rejected", COMPLETIONS, 400),
        ("rejected", COMPLETIONS, 400),
        ("rejected", COMPLETIONS, 404),
    ]
    assert [line[0] for line in lines[5:]] == ["start", "end", "start", "end"]
    assert lines[6][1] == "cmpl-b" and lines[6][3] == 500
    assert lines[8][1] == "cmpl-c" and lines[8][2:4] == (("abort",), 499)
    assert sum(line[2] for line in notes.lines if line[:2] == ("tokens", "cmpl-a")) == 3
