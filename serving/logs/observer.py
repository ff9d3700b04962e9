"""`RequestLog`: the observer that writes one line per request."""

from __future__ import annotations

import logging
import queue
from logging.handlers import QueueHandler, QueueListener
from typing import TextIO

from engine.outputs import RequestOutput
from serving.http.observer import RequestEnd, RequestStart
from serving.logs.lines import LineFormatter, LogFormat, RequestLine, shorten
from serving.metrics.http import CLIENT_LEFT
from serving.metrics.times import first_token_s

LOGGER = "quire.requests"


class _Unchanged(QueueHandler):
    """Puts the record itself in the queue: it never leaves the process, and is formatted by the thread that writes."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


class RequestLog:
    """Writes lines to a stream, in a thread of its own. `close` writes what waits.

    Args:
        style: "text" or "json".
        stream: where to.
    """

    def __init__(self, style: LogFormat, stream: TextIO) -> None:
        lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        writer = logging.StreamHandler(stream)
        writer.setFormatter(LineFormatter(style))
        # A logger of our own, in no hierarchy: nobody else's handlers or levels apply, and two servers do not mix.
        self._logger = logging.Logger(LOGGER, logging.INFO)
        self._logger.addHandler(_Unchanged(lines))
        self._listener = QueueListener(lines, writer)
        self._listener.start()
        self._live: dict[str, RequestStart] = {}

    def on_start(self, start: RequestStart) -> None:
        """A request was accepted."""
        self._live[start.request_id] = start

    def on_tokens(self, request_id: str, num_tokens: int, time: float) -> None:
        """Nothing to write."""

    def on_end(self, end: RequestEnd) -> None:
        """A request ended: its line."""
        start = self._live.pop(end.request_id, None)
        if start is not None:
            self._write(line_of(start, end))

    def on_rejected(self, endpoint: str, status: int, reason: str) -> None:
        """A request was refused: its line."""
        self._write(RequestLine(None, endpoint, None, status, error=shorten(reason)))

    def _write(self, line: RequestLine) -> None:
        # `Logger.log` would look for the caller's file and line: frames that nobody shows.
        self._logger.handle(logging.LogRecord(LOGGER, line.level, "", 0, line, None, None))  # type: ignore[arg-type]

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._listener.stop()


def line_of(start: RequestStart, end: RequestEnd) -> RequestLine:
    """What there is to say of a request that ended."""
    output = end.output
    times = None if output is None else output.metrics
    guessed = times if times is not None and times.num_draft_tokens > 0 else None
    return RequestLine(
        request_id=start.request_id,
        endpoint=start.endpoint,
        model=start.model,
        status=end.status,
        prompt_tokens=start.num_prompt_tokens,
        cached_tokens=None if output is None else output.num_cached_tokens,
        output_tokens=end.num_output_tokens,
        finish_reasons=end.finish_reasons,
        client_abort=end.status == CLIENT_LEFT or "abort" in end.finish_reasons,
        queue_ms=_queue_ms(output),
        ttft_ms=_ms(first_token_s(end)),
        e2e_ms=_ms(end.e2e_s),
        draft_tokens=None if guessed is None else guessed.num_draft_tokens,
        accepted_tokens=None if guessed is None else guessed.num_accepted_tokens,
        error=shorten(end.error),
    )


def _queue_ms(output: RequestOutput | None) -> float | None:
    times = None if output is None else output.metrics
    if times is None or times.scheduled_ts is None:
        return None
    return _ms(times.scheduled_ts - times.arrival_time)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
