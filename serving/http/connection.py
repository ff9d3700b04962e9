"""One connection: aiohttp's, with a time limit for its headers and faults of HTTP itself in the API's body."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from serving.http.errors import ApiError, fault_of, json_response

logger = logging.getLogger("quire.serving")


class Connection(RequestHandler):
    """Closes a connection that sends nothing, or that sends its headers too slowly.

    Args:
        server, **settings: as aiohttp's.
        receive_timeout: seconds from the first byte (or from connecting) to the end of the headers.
    """

    __slots__ = ("_receive_timeout", "_receive_timer", "_time_loop")

    def __init__(
        self, server: web.Server, *, loop: asyncio.AbstractEventLoop, receive_timeout: float, **settings: Any
    ) -> None:
        super().__init__(server, loop=loop, **settings)
        self._time_loop = loop
        self._receive_timeout = receive_timeout
        self._receive_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio's."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As asyncio's."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: BaseException | None) -> None:
        """As asyncio's."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Run the timer exactly while no request has all its headers."""
        if self._messages or self._current_request is not None:
            self._stop_watching()
        elif self._receive_timer is None:
            self._receive_timer = self._time_loop.call_later(self._receive_timeout, self._give_up)

    def _stop_watching(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None

    def _give_up(self) -> None:
        self._receive_timer = None
        transport = self.transport
        if transport is None or self._messages or self._current_request is not None:
            return
        body = fault_of(
            ApiError(408, f"The request's headers did not arrive within {self._receive_timeout:g} seconds.")
        ).body()
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        # uvloop's transports are none of asyncio's by their type.
        cast("asyncio.Transport", transport).write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.force_close()
        transport.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP, and to what the app did not catch."""
        if status >= 500:
            logger.error("%s %s failed", request.method, request.path, exc_info=exc)
            answer = json_response(fault_of(RuntimeError()))
        else:
            text = (message or "").splitlines()
            answer = json_response(fault_of(ApiError(status, text[0] if text else "This is not valid HTTP.")))
        answer.force_close()
        return answer
