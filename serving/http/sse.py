"""Server-sent events: one write per event, faults before the first event as statuses, faults after it as events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from aiohttp import web
from aiohttp.http_writer import StreamWriter

from serving.http.context import context_of
from serving.http.errors import Fault, fault_of, is_known

logger = logging.getLogger("quire.serving")

DONE = b"data: [DONE]\n\n"
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class SlowReaderError(ConnectionError):
    """The client did not read its answer in time; it is given up."""


def openai_fault_event(fault: Fault) -> bytes:
    """The fault as OpenAI's clients read it, and the end of the stream."""
    return fault.event() + DONE


async def send_events(
    request: web.Request,
    events: AsyncGenerator[bytes],
    *,
    fault_event: Callable[[Fault], bytes] = openai_fault_event,
) -> web.StreamResponse:
    """Answer with events as they come. Leaving it, in whatever way, closes `events`.

    Args:
        request: to answer.
        events: whole events, each `data: …` (or `event: …`) with its empty line; at least one.
        fault_event: the bytes that end a stream which fails after its first event.

    Raises:
        Whatever the events raise before the first one: then nothing was sent.
    """
    settings = context_of(request).settings
    response = web.StreamResponse(headers=HEADERS)
    protocol, writer = request.protocol, None
    async with aclosing(events):
        try:
            async with asyncio.timeout(settings.request_timeout):
                first = await anext(events)
                opened = await response.prepare(request)
                assert isinstance(opened, StreamWriter), "nothing was sent yet"
                writer = opened
                await writer.write(first, drain=False)
                async for event in events:
                    if protocol.writing_paused:
                        await _drain(request, writer, settings.send_timeout)
                    await writer.write(event, drain=False)
                if protocol.writing_paused:  # aiohttp would wait for ever for the last bytes to be read
                    await _drain(request, writer, settings.send_timeout)
        except ConnectionError as error:
            logger.debug("a stream was given up: %s", error)
            return response
        except Exception as error:
            if writer is None:
                raise
            if not is_known(error):
                logger.exception("a stream failed")
            with contextlib.suppress(ConnectionError):
                await writer.write(fault_event(fault_of(error)), drain=False)
                if protocol.writing_paused:
                    await _drain(request, writer, settings.send_timeout)
    with contextlib.suppress(ConnectionError):
        await response.write_eof()
    return response


async def _drain(request: web.Request, writer: StreamWriter, timeout_s: float) -> None:
    """Wait until the client has read something. Meanwhile the engine merges what comes: nothing piles up here.

    Raises:
        SlowReaderError: it did not for `timeout_s` seconds; the connection is closed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await writer.drain()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise SlowReaderError(f"the client read nothing for {timeout_s:g} seconds") from None
