"""A server of the OpenAI API whose answers and times are written down beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvloop
from aiohttp import web


@dataclass
class Script:
    """What the server does.

    Attributes:
        delays_s: time before each chunk; as many as tokens are asked for if `delays_s` is shorter, with the last one.
        tokens_per_chunk: how many tokens one chunk carries.
        fail_with: an HTTP status instead of an answer.
        fault: "cut" after half the chunks, "no-done" without `[DONE]`, "error" as an event, "no-usage", "short" by one
            token, "junk" that is no JSON.
        fail_every: only every so many requests fails (1 = all).
        key: the API key that is needed.
    """

    delays_s: tuple[float, ...] = (0.0,)
    tokens_per_chunk: int = 1
    fail_with: int | None = None
    fault: str | None = None
    fail_every: int = 1
    key: str | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One completion, of a text or of a chat."""
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "wrong API key"}}, status=401)
        body = await request.json()
        self.seen.append(body)
        fails = len(self.seen) % self.fail_every == 0
        if fails and self.fail_with is not None:
            return web.json_response({"error": {"message": "scripted\nfailure"}}, status=self.fail_with)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, body, self.fault if fails else None)
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: str | None) -> web.StreamResponse:
        chat = "messages" in body
        wanted = body["max_completion_tokens" if chat else "max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def write(value: Any) -> None:
            await response.write(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")

        if chat:
            await write({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        num_chunks = -(-wanted // self.tokens_per_chunk)
        for index in range(num_chunks):
            await asyncio.sleep(self.delays_s[min(index, len(self.delays_s) - 1)])
            if fault == "cut" and index >= num_chunks // 2:
                assert request.transport is not None
                request.transport.abort()
                return response
            if fault == "error" and index == 1:
                await write({"error": {"message": "the engine died"}})
            if fault == "junk":
                await response.write(b"data: <html>\n\n")
            text = 'w "choices":[] '
            await write({"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
        if fault != "no-usage":
            usage = {"prompt_tokens": 7, "completion_tokens": wanted - (fault == "short")}
            await write({"choices": [], "usage": usage})
        if fault != "no-done":
            await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, request: web.Request) -> web.Response:
        """The list of models."""
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "wrong API key"}}, status=401)
        return web.json_response({"data": [{"id": "scripted"}]})

    def app(self) -> web.Application:
        """The server's routes."""
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        return app


@contextlib.contextmanager
def served(app: web.Application) -> Iterator[str]:
    """Serve `app` on a free port of this machine, from a thread of its own; yields its base URL."""
    loop = uvloop.new_event_loop()
    started: list[int] = []
    ready = threading.Event()
    runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        started.append(runner.addresses[0][1])
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{started[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
