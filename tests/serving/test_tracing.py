"""Spans: attributes, events and parents, in memory and as a collector receives them over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import subprocess
import sys

import pytest

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is an extra: pip install 'quire-llm[otel]'")

from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serving import observability
from serving.errors import UsageError
from serving.observability import ObservabilityConfig, observe
from serving.tracing.spans import RequestSpans
from tests.serving.observing import SnapshotClient, end_of, start_of

TRACE, PARENT = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACE_PARENT = f"00-{TRACE:032x}-{PARENT:016x}-01"


def spans_of(*pairs: tuple) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    observer = RequestSpans(exporter)
    for start, end in pairs:
        observer.on_start(start)
        observer.on_end(end)
    observer.close()
    return list(exporter.get_finished_spans())


def test_a_request_is_a_span() -> None:
    [span] = spans_of((start_of(), end_of()))
    assert (span.name, span.kind, span.parent, span.status.status_code) == (
        "llm_request",
        SpanKind.SERVER,
        None,
        StatusCode.UNSET,
    )
    attributes = dict(span.attributes or {})
    times = {name: attributes.pop(name) for name in list(attributes) if name.startswith("gen_ai.latency.")}
    assert times == pytest.approx(
        {
            "gen_ai.latency.e2e": 1.8,
            "gen_ai.latency.time_to_first_token": 0.7,
            "gen_ai.latency.time_in_queue": 0.5,
            "gen_ai.latency.time_in_model_prefill": 0.2,
            "gen_ai.latency.time_in_model_decode": 1.0,
            "gen_ai.latency.time_in_model_inference": 1.2,
        }
    )
    assert attributes == {
        "gen_ai.request.id": "req-1",
        "gen_ai.response.model": "tiny",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.usage.prompt_tokens": 10,
        "gen_ai.usage.completion_tokens": 11,
        "gen_ai.usage.cached_tokens": 4,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 16,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
    }
    assert "secret" not in span.to_json()


def test_events_are_in_order_within_the_span() -> None:
    [span] = spans_of((start_of(), end_of()))
    assert span.start_time is not None and span.end_time is not None
    assert [event.name for event in span.events] == ["queued", "prefill", "decode"]
    since = [(event.timestamp - span.start_time) / 1e9 for event in span.events]
    assert since == pytest.approx([0.0, 0.5, 0.7], abs=1e-5)
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(1.8, abs=1e-5)


def test_the_callers_span_is_the_parent() -> None:
    [span] = spans_of((start_of(trace_parent=TRACE_PARENT), end_of()))
    assert span.parent is not None and span.context is not None
    assert (span.context.trace_id, span.parent.span_id) == (TRACE, PARENT)


@pytest.mark.parametrize("header", ["", "garbage", "00-0-0-01", f"00-{0:032x}-{PARENT:016x}-01"])
def test_a_broken_parent_is_no_parent(header: str) -> None:
    [span] = spans_of((start_of(trace_parent=header), end_of()))
    assert span.parent is None


def test_a_caller_may_ask_not_to_be_traced() -> None:
    assert spans_of((start_of(trace_parent=TRACE_PARENT[:-2] + "00"), end_of())) == []


def test_failures_and_embeddings() -> None:
    failed, embedded = spans_of(
        (start_of(), end_of(status=500, output=None, error="a step failed", first_token_s=None)),
        (start_of(params=None), end_of(num_output_tokens=0)),
    )
    assert failed.status.status_code is StatusCode.ERROR and failed.status.description == "a step failed"
    assert not failed.events
    assert dict(embedded.attributes or {})["gen_ai.operation.name"] == "embeddings"


def test_a_collector_receives_them() -> None:
    """Over HTTP, in OTLP's own encoding, sent by a thread while the event loop goes on."""
    received: list[ExportTraceServiceRequest] = []

    async def collect(request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        message = ExportTraceServiceRequest()
        message.ParseFromString(body)
        received.append(message)
        return web.Response(content_type="application/x-protobuf")

    async def use() -> None:
        app = web.Application()
        app.router.add_post("/v1/traces", collect)
        async with TestServer(app) as server:
            config = ObservabilityConfig(log_requests=False, otlp_traces_endpoint=str(server.make_url("/v1/traces")))
            parts = observe(SnapshotClient(), "tiny", config)  # type: ignore[arg-type]
            for observer in parts.observers:
                observer.on_start(start_of())
                observer.on_end(end_of())
            await asyncio.to_thread(parts.close)

    asyncio.run(asyncio.wait_for(use(), 60))
    [span] = [s for m in received for r in m.resource_spans for scope in r.scope_spans for s in scope.spans]
    assert span.name == "llm_request" and [event.name for event in span.events] == ["queued", "prefill", "decode"]
    service = {a.key: a.value.string_value for a in received[0].resource_spans[0].resource.attributes}
    assert service["service.name"] == "quire"


def test_a_wrong_endpoint_is_refused() -> None:
    for endpoint in ("localhost:4318", "grpc://localhost:4317", "http://"):
        with pytest.raises(UsageError, match="must be a URL such as"):
            ObservabilityConfig(otlp_traces_endpoint=endpoint)
    with pytest.raises(UsageError, match="log-format must be text or json"):
        ObservabilityConfig(log_format="xml")  # type: ignore[arg-type]


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "serving.tracing.spans", raising=False)
    importlib.reload(observability)
    config = observability.ObservabilityConfig(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
    with pytest.raises(Exception, match=r"needs OpenTelemetry .* pip install 'quire-llm\[otel\]'"):
        observability.observe(SnapshotClient(), "tiny", config)  # type: ignore[arg-type]


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    code = "import sys, serving.observability; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
