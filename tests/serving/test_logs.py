"""Request lines: what they say, that nothing private is in them, and that they never hold up who writes them."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from msgspec import structs

from engine.errors import RequestFailedError
from serving.http.observer import RequestEnd, RequestStart
from serving.logs.lines import RequestLine, as_json, as_text
from serving.logs.observer import RequestLog, line_of
from tests.serving.observing import end_of, start_of

NOON = datetime(2026, 1, 2, 12, 0, 0, 5000, UTC)


def written(style: str, *requests: tuple[RequestStart, RequestEnd]) -> list[str]:
    """The lines of requests."""
    stream = io.StringIO()
    log = RequestLog(style, stream)  # type: ignore[arg-type]
    for start, end in requests:
        log.on_start(start)
        log.on_tokens(start.request_id, 1, start.time)
        log.on_end(end)
    log.close()
    return stream.getvalue().splitlines()


def test_a_line_of_text() -> None:
    assert as_text(line_of(start_of(), end_of()), NOON) == (
        "2026-01-02T12:00:00.005Z req-1 /v1/completions 200 model=tiny stop | 10 (4 cached) + 11 tokens "
        "| queue 500.0 ms, ttft 700.0 ms, e2e 1800.0 ms"
    )


def test_a_line_of_a_request_that_had_drafts() -> None:
    end = end_of()
    assert end.output is not None and end.output.metrics is not None
    times = structs.replace(end.output.metrics, num_drafts=4, num_draft_tokens=12, num_accepted_tokens=7)
    line = line_of(start_of(), replace(end, output=structs.replace(end.output, metrics=times)))
    assert as_text(line, NOON).endswith("e2e 1800.0 ms | 7 of 12 drafts")
    found = json.loads(as_json(line, NOON))
    assert (found["draft_tokens"], found["accepted_tokens"]) == (12, 7)


def test_a_line_of_json() -> None:
    assert json.loads(as_json(line_of(start_of(), end_of()), NOON)) == {
        "time": "2026-01-02T12:00:00.005Z",
        "level": "info",
        "request_id": "req-1",
        "endpoint": "/v1/completions",
        "model": "tiny",
        "status": 200,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 11,
        "finish_reasons": ["stop"],
        "client_abort": False,
        "queue_ms": 500.0,
        "ttft_ms": 700.0,
        "e2e_ms": 1800.0,
    }


@pytest.mark.parametrize("style", ["text", "json"])
def test_one_line_per_request(style: str) -> None:
    pairs = [(start_of(f"req-{n}"), end_of(f"req-{n}")) for n in range(50)]
    lines = written(style, *pairs)
    assert len(lines) == 50
    assert all(f"req-{n}" in line for n, line in enumerate(lines))


def test_how_requests_end_badly() -> None:
    left = line_of(start_of(), end_of(status=499, finish_reasons=("abort",), first_token_s=None))
    assert left.client_abort and left.level == logging.INFO
    assert "499" in as_text(left, NOON) and "(the client left)" in as_text(left, NOON)
    error = RequestFailedError("a step of the engine failed: " + "x" * 1000)
    failed = line_of(start_of(), end_of(status=500, output=None, error=str(error), finish_reasons=("error",)))
    assert failed.level == logging.WARNING and failed.error is not None and len(failed.error) == 300
    assert failed.queue_ms is None and json.loads(as_json(failed, NOON))["level"] == "warning"


def test_a_refused_request_has_a_line() -> None:
    stream = io.StringIO()
    log = RequestLog("json", stream)
    log.on_rejected("/v1/completions", 503, "the queue is full")
    log.close()
    [line] = map(json.loads, stream.getvalue().splitlines())
    assert line.pop("time") and line == {
        "level": "warning",
        "endpoint": "/v1/completions",
        "status": 503,
        "client_abort": False,
        "error": "the queue is full",
    }


@pytest.mark.parametrize("style", ["text", "json"])
def test_prompts_and_answers_are_not_logged(style: str) -> None:
    [line] = written(style, (start_of(trace_parent="00-secret"), end_of()))
    assert "secret" not in line


@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.parametrize("evil", ["a\nb", "a\r\nb", "a\x1b[2Jb", "a\u2028b", 'a"b', "a\x00b"])
def test_a_client_cannot_write_lines_of_its_own(style: str, evil: str) -> None:
    stream = io.StringIO()
    log = RequestLog(style, stream)  # type: ignore[arg-type]
    log.on_start(start_of(evil, endpoint=evil, model=evil))
    log.on_end(end_of(evil, error=evil))
    log.on_rejected(evil, 404, evil)
    log.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    if style == "json":
        assert json.loads(lines[0])["request_id"] == evil
    else:
        assert all(line.isprintable() for line in lines)


def test_a_slow_stream_holds_nobody_up() -> None:
    """Lines wait in the queue, in order, and `close` writes them."""
    gate = threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            gate.wait(20)
            return super().write(text)

    stream = Slow()
    log = RequestLog("text", stream)
    started = time.perf_counter()
    for number in range(200):
        log.on_start(start_of(f"req-{number}"))
        log.on_end(end_of(f"req-{number}"))
    assert time.perf_counter() - started < 5 and stream.getvalue() == ""
    gate.set()
    log.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"req-{number}" for number in range(200)]


def test_an_end_without_a_start_is_not_a_line() -> None:
    stream = io.StringIO()
    log = RequestLog("text", stream)
    log.on_end(end_of("never started"))
    log.close()
    assert stream.getvalue() == ""


def test_a_line_without_anything() -> None:
    assert as_text(RequestLine(None, "/v1/x", None, 401), NOON) == "2026-01-02T12:00:00.005Z - /v1/x 401"
