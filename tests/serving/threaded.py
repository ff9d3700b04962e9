"""A server in a thread, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import uvloop

from serving.endpoints import ALL_ROUTES
from serving.http.app import make_app
from serving.http.context import make_context
from serving.http.server import HttpServer
from serving.http.settings import ServerSettings
from tests.serving.fakes import FakeEngine


class Server:
    """A server in a thread; `engine.script` may be changed between requests."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.engine = engine
        self._settings = ServerSettings(**{"port": 0, **settings})
        self.url = ""
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()))
        self._thread.start()
        assert self._started.wait(20)

    async def _run(self) -> None:
        server = HttpServer(make_app(make_context(self.engine, self._settings), ALL_ROUTES))
        self.url = await server.start()
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._stop.wait()
        await server.stop()

    def close(self) -> None:
        """Stop and wait."""
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
