"""What a server watches itself with, put together: metrics, request lines, spans, timelines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from engine.client import EngineClient
from serving.endpoints.timeline import timeline_route
from serving.errors import UsageError
from serving.http.observer import Observer
from serving.http.routes import Route
from serving.logs.lines import LogFormat
from serving.logs.observer import RequestLog
from serving.metrics.exposition import Metrics


@dataclass(frozen=True)
class ObservabilityConfig:
    """What a user chooses.

    Attributes:
        log_format: of request lines: "text" or "json".
        log_requests: False = no request lines.
        otlp_traces_endpoint: URL of an OTLP/HTTP collector's traces; None = no spans.

    Raises:
        UsageError: a value is not one of those.
    """

    log_format: LogFormat = "text"
    log_requests: bool = True
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.log_format not in ("text", "json"):
            raise UsageError(f"--log-format must be text or json, got {self.log_format!r}.")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and (
            urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc
        ):
            raise UsageError(
                f"--otlp-traces-endpoint must be a URL such as http://localhost:4318/v1/traces, got {endpoint!r}."
            )


@dataclass(frozen=True)
class Observability:
    """The parts that the app takes.

    Attributes:
        metrics: with the middleware that counts HTTP requests, `metrics.http.middleware`.
        observers: told of every request.
        routes: /metrics and timelines.
        closers: to be called when the server has stopped; each writes or sends what waits.
    """

    metrics: Metrics
    observers: tuple[Observer, ...]
    routes: tuple[Route, ...]
    closers: tuple[Callable[[], None], ...]

    def close(self) -> None:
        """Write and send what waits."""
        for closer in self.closers:
            closer()


def observe(client: EngineClient, model_name: str, config: ObservabilityConfig) -> Observability:
    """Start everything that watches a server.

    Args:
        model_name: the name that the model is served under.

    Raises:
        UsageError: spans are wanted, and OpenTelemetry is not installed.
    """
    metrics = Metrics(client, model_name)
    observers: list[Observer] = [metrics.requests]
    closers: list[Callable[[], None]] = []
    # Spans first: what fails must fail before a thread runs.
    if config.otlp_traces_endpoint is not None:
        spans = _spans(config.otlp_traces_endpoint)
        observers.append(spans)
        closers.append(spans.close)
    if config.log_requests:
        log = RequestLog(config.log_format, sys.stderr)
        observers.append(log)
        closers.append(log.close)
    return Observability(metrics, tuple(observers), (metrics.route, timeline_route(client)), tuple(closers))


def _spans(endpoint: str):  # noqa: ANN202
    try:
        from serving.tracing.spans import RequestSpans
    except ImportError as error:
        raise UsageError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error.name} is missing): pip install 'quire-llm[otel]'."
        ) from error
    return RequestSpans.to_endpoint(endpoint)
