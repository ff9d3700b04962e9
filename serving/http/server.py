"""Listening, and stopping well.

run:     accept ──▶ SIGTERM ──▶ drain: no new connections, 503 for new requests, running ones go on
                                 │ all done, shutdown_timeout over, or a second signal
                                 ▼
         abort what still runs (its last event says so) ──▶ close
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import stat
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from aiohttp import web

from engine.errors import ConfigError
from serving.http.connection import Connection
from serving.http.context import CONTEXT, ServerContext
from serving.http.settings import ServerSettings

logger = logging.getLogger("quire.serving")
access_logger = logging.getLogger("quire.access")

ABORT_GRACE_S = 5.0  # for the last events of requests that were aborted at the end


class HttpServer:
    """Serves an app until it is stopped.

    Args:
        app: made by `make_app`.
    """

    def __init__(self, app: web.Application) -> None:
        self._context: ServerContext = app[CONTEXT]
        self._settings = self._context.settings
        self._runner = web.AppRunner(
            app, handle_signals=False, handler_cancellation=True, shutdown_timeout=ABORT_GRACE_S, access_log=None
        )
        self._listener: asyncio.Server | None = None
        self._socket_file: str | None = None

    async def start(self) -> str:
        """Listen.

        Returns:
            The URL, with the port that was found if it was 0; or `unix:` and the path.

        Raises:
            ConfigError: the address is in use or not ours, or the certificate cannot be used.
        """
        settings = self._settings
        tls = _tls_context(settings)
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None, "set up above"

        def connect() -> Connection:
            return Connection(
                server,
                loop=loop,
                receive_timeout=settings.receive_timeout,
                keepalive_timeout=settings.keepalive_timeout,
                lingering_time=1.0,
                # aiohttp takes the logger's absence as "no log", whatever its type says
                access_log=access_logger if settings.access_log else None,
            )

        scheme = "http" if tls is None else "https"
        try:
            if settings.uds is not None:
                _remove_stale_socket(settings.uds)
                self._listener = await loop.create_unix_server(connect, settings.uds, ssl=tls, backlog=1024)
                self._socket_file = settings.uds
                return f"unix:{settings.uds}"
            self._listener = await loop.create_server(
                connect, settings.host, settings.port, ssl=tls, backlog=1024, reuse_address=True
            )
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(_why_not_listening(settings, error)) from error
        port = self._listener.sockets[0].getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"{scheme}://{host}:{port}"

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Drain, abort what is left, close. May be called once.

        Args:
            hurry: set it to end the draining at once.
        """
        context = self._context
        context.traffic.draining = True
        if self._listener is not None:
            self._listener.close()
        if self._socket_file is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._socket_file)
        if context.traffic.num_live:
            logger.info("shutting down: %d requests have up to %g s", context.traffic.num_live, self._drain_s)
            await _wait_for_any(context.traffic.wait_idle(), hurry, self._drain_s)
        if context.traffic.num_live:
            logger.warning("shutting down: %d requests are aborted", context.traffic.num_live)
            for request_id in list(context.traffic.engine_ids):
                context.client.abort(request_id)
            await _wait_for_any(context.traffic.wait_idle(), None, ABORT_GRACE_S)
        await self._runner.cleanup()

    @property
    def _drain_s(self) -> float:
        return self._settings.shutdown_timeout


async def _wait_for_any(done: Coroutine[Any, Any, None], hurry: asyncio.Event | None, timeout_s: float) -> None:
    """Wait for `done`, an event or a time, whichever comes first."""
    waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(done)]
    if hurry is not None:
        waits.append(asyncio.ensure_future(hurry.wait()))
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def run_server(app: web.Application, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the draining at once.

    Args:
        app: made by `make_app`.
        announce: told the URL when the server listens.

    Raises:
        ConfigError: as `HttpServer.start`.
    """
    server = HttpServer(app)
    with stop_signals() as (stop, hurry):
        announce(await server.start())
        await stop.wait()
        await server.stop(hurry)


@contextlib.contextmanager
def stop_signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """While inside, SIGTERM and SIGINT set the first event, and when that is set, the second."""
    loop, stop, hurry = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop, hurry
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """The TLS settings, or None for plain HTTP.

    Raises:
        ConfigError: a file cannot be read, or key and certificate do not belong together.
    """
    if settings.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"ssl_certfile {settings.ssl_certfile} with ssl_keyfile {settings.ssl_keyfile} cannot be used: {error}."
        ) from error
    return context


def _remove_stale_socket(path: str) -> None:
    """Remove what a killed server left; never a file that is no socket, nor a socket that answers.

    Raises:
        OSError: another server listens there, or it is something else.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "it exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "address already in use")


def _why_not_listening(settings: ServerSettings, error: OSError) -> str:
    if settings.uds is not None:
        return f"cannot listen on the socket {settings.uds}: {error.strerror or error}."
    hint = " Choose another --port, or 0 for any free one." if error.errno == errno.EADDRINUSE else ""
    reason = "the address is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return f"cannot listen on {settings.host} port {settings.port}: {reason}.{hint}"
