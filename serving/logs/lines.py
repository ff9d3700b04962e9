"""`RequestLine`: what one line says, and its two formats."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LONGEST_ERROR = 300  # characters; an error may quote what the client sent


@dataclass(frozen=True)
class RequestLine:
    """One finished, or refused, request. Times in milliseconds, rounded to 0.1; None where it does not apply.

    Attributes:
        request_id: None if it was refused before it had one.
        status: HTTP status.
        finish_reasons: of its completions.
        client_abort: True if the client left before the end.
        queue_ms: arrival to first step. ttft_ms: arrival to first token. e2e_ms: arrival to end.
        draft_tokens, accepted_tokens: guesses of speculative decoding that were verified, and that were right.
        error: what went wrong, cut to 300 characters.
    """

    request_id: str | None
    endpoint: str
    model: str | None
    status: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reasons: tuple[str, ...] = ()
    client_abort: bool = False
    queue_ms: float | None = None
    ttft_ms: float | None = None
    e2e_ms: float | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    error: str | None = None

    @property
    def level(self) -> int:
        """WARNING for a failure of the server, INFO for everything else."""
        return logging.WARNING if self.status >= 500 else logging.INFO


def shorten(error: str | None) -> str | None:
    """One line of at most `LONGEST_ERROR` characters: a client must not write lines of its own into the log."""
    if error is None:
        return None
    flat = printable(" ".join(error.split()))
    return flat if len(flat) <= LONGEST_ERROR else flat[: LONGEST_ERROR - 1] + "…"


def printable(text: str) -> str:
    """The text with "?" for whatever could move a cursor or begin a line."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def as_text(line: RequestLine, time: datetime) -> str:
    """`2026-11-25T10:00:00.123Z req-1 /v1/completions 200 stop | 5 (0 cached) + 16 tokens | queue 0.4 ms, …`"""
    parts = [_stamp(time), line.request_id or "-", line.endpoint, str(line.status)]
    if line.model is not None:
        parts.append(f"model={line.model}")
    parts += line.finish_reasons
    if line.client_abort:
        parts.append("(the client left)")
    if line.prompt_tokens is not None:
        cached = "" if line.cached_tokens is None else f" ({line.cached_tokens} cached)"
        parts.append(f"| {line.prompt_tokens}{cached} + {line.output_tokens or 0} tokens")
    times = [("queue", line.queue_ms), ("ttft", line.ttft_ms), ("e2e", line.e2e_ms)]
    if known := [f"{name} {value:.1f} ms" for name, value in times if value is not None]:
        parts.append("| " + ", ".join(known))
    if line.draft_tokens is not None:
        parts.append(f"| {line.accepted_tokens} of {line.draft_tokens} drafts")
    if line.error is not None:
        parts.append(f"| {line.error}")
    return printable(" ".join(parts))


def as_json(line: RequestLine, time: datetime) -> str:
    """One JSON object; entries that do not apply are left out."""
    fields: dict[str, Any] = {"time": _stamp(time), "level": logging.getLevelName(line.level).lower()}
    fields |= {key: value for key, value in asdict(line).items() if value is not None and value != ()}
    return json.dumps(fields)  # in ASCII: some readers end a line at U+2028 as well


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class LineFormatter(logging.Formatter):
    """Formats records whose message is a `RequestLine`."""

    def __init__(self, style: LogFormat) -> None:
        super().__init__()
        self._format = as_json if style == "json" else as_text

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        assert isinstance(record.msg, RequestLine), "only RequestLog writes to this logger"
        return self._format(record.msg, datetime.fromtimestamp(record.created, UTC))
