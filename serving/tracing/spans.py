"""`RequestSpans`: the observer that makes one span per request.

Span name and attributes are those of vLLM (`llm_request`, `gen_ai.*`), so that what reads its spans reads ours. A
span is made when its request ends, with the times at which things happened; until then only the start is kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from serving.http.observer import RequestEnd, RequestStart
from serving.metrics.times import first_token_s

SPAN_NAME = "llm_request"
NANOSECONDS = 1_000_000_000
EXPORT_TIMEOUT_S = 10.0


class RequestSpans:
    """Makes spans and hands them to an exporter, which sends them in batches from a thread of its own.

    Args:
        exporter: where spans go.
        service_name: of the resource.
    """

    def __init__(self, exporter: SpanExporter, service_name: str = "quire") -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("quire.serving")
        self._parents = TraceContextTextMapPropagator()
        self._live: dict[str, RequestStart] = {}
        # Requests are timed by a clock that knows no date; spans need one.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    @classmethod
    def to_endpoint(cls, endpoint: str) -> RequestSpans:
        """Spans that go to an OTLP/HTTP collector, such as `http://localhost:4318/v1/traces`."""
        return cls(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S))

    def on_start(self, start: RequestStart) -> None:
        """A request was accepted."""
        self._live[start.request_id] = start

    def on_tokens(self, request_id: str, num_tokens: int, time: float) -> None:
        """The engine's own times, which come with the last output, are better."""

    def on_rejected(self, endpoint: str, status: int, reason: str) -> None:
        """Nothing was done, so there is no span."""

    def on_end(self, end: RequestEnd) -> None:
        """A request ended: its span."""
        start = self._live.pop(end.request_id, None)
        if start is None:
            return
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._parent(start),
            kind=SpanKind.SERVER,
            attributes=attributes_of(start, end),
            start_time=self._ns(start.time),
        )
        times = None if end.output is None else end.output.metrics
        if times is not None:
            span.add_event("queued", timestamp=self._ns(times.arrival_time))
            if times.scheduled_ts is not None:
                span.add_event("prefill", timestamp=self._ns(times.scheduled_ts))
            if times.first_token_ts is not None:
                span.add_event("decode", timestamp=self._ns(times.first_token_ts))
        if end.status >= 500:
            span.set_status(Status(StatusCode.ERROR, end.error))
        span.end(self._ns(start.time + end.e2e_s))

    def close(self) -> None:
        """Send what waits, and end the thread."""
        self._provider.shutdown()

    def _parent(self, start: RequestStart) -> Context:
        """The caller's span. An empty context otherwise: never whatever span is current in this process."""
        carrier = {} if start.trace_parent is None else {"traceparent": start.trace_parent}
        return self._parents.extract(carrier, context=Context())

    def _ns(self, monotonic: float) -> int:
        return self._epoch_ns + int(monotonic * NANOSECONDS)


def attributes_of(start: RequestStart, end: RequestEnd) -> Mapping[str, AttributeValue]:
    """vLLM's attributes of one request; times in seconds. Never a prompt or an answer."""
    found: dict[str, AttributeValue | None] = {
        "gen_ai.request.id": start.request_id,
        "gen_ai.response.model": start.model,
        "gen_ai.operation.name": "embeddings" if start.params is None else "text_completion",
        "gen_ai.usage.prompt_tokens": start.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": end.num_output_tokens,
        "gen_ai.response.finish_reasons": list(end.finish_reasons),
        "gen_ai.latency.e2e": end.e2e_s,
        "gen_ai.latency.time_to_first_token": first_token_s(end),
        "http.route": start.endpoint,
        "http.response.status_code": end.status,
    }
    params, output = start.params, end.output
    if params is not None:
        found |= {
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
        }
    if output is not None:
        found["gen_ai.usage.cached_tokens"] = output.num_cached_tokens
    times = None if output is None else output.metrics
    if times is not None and times.scheduled_ts is not None:
        found["gen_ai.latency.time_in_queue"] = times.scheduled_ts - times.arrival_time
        if times.first_token_ts is not None and times.last_token_ts is not None:
            found["gen_ai.latency.time_in_model_prefill"] = times.first_token_ts - times.scheduled_ts
            found["gen_ai.latency.time_in_model_decode"] = times.last_token_ts - times.first_token_ts
            found["gen_ai.latency.time_in_model_inference"] = times.last_token_ts - times.scheduled_ts
    return {name: value for name, value in found.items() if value is not None}
