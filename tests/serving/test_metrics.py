"""`GET /metrics`: names, labels, buckets, values, and a form that Prometheus' own tools accept."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import subprocess
import time
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from engine.sampling_params import RequestOutputKind, SamplingParams
from serving.http.observer import RequestEnd, RequestStart
from serving.metrics.exposition import Metrics
from serving.metrics.histograms import PER_TOKEN_S, REQUEST_S, Histogram, token_bounds
from serving.metrics.requests import RequestMetrics
from tests.serving.observing import SNAPSHOT, SnapshotClient, end_of, start_of

LABELS = {"model_name": 'a "name"\\', "engine": "0"}


def make_metrics(snapshot: dict[str, Any] | None = None) -> Metrics:
    return Metrics(SnapshotClient(snapshot), LABELS["model_name"])  # type: ignore[arg-type]


def text_of(metrics: Metrics, accept: str = "") -> str:
    return asyncio.run(metrics.render(accept))[0].decode()


def samples_of(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, sorted labels but those of the model) -> value."""
    found = {}
    for family in text_string_to_metric_families(text_of(metrics)):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert {k: sample.labels[k] for k in LABELS} == LABELS, sample
            rest = tuple(sorted((k, v) for k, v in sample.labels.items() if k not in LABELS))
            assert (sample.name, rest) not in found
            found[sample.name, rest] = sample.value
    return found


def feed(observer: RequestMetrics, start: RequestStart, gaps: list[tuple[float, int]], end: RequestEnd) -> None:
    """One request: (seconds since the last output, tokens in it) each."""
    observer.on_start(start)
    now = start.time
    for gap, num_tokens in gaps:
        now += gap
        observer.on_tokens(start.request_id, num_tokens, now)
    observer.on_end(end)


def test_every_entry_of_the_snapshot_has_its_metric() -> None:
    found = samples_of(make_metrics())
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "quire:steps_in_flight": 1,
        "vllm:prompt_tokens_total": 850,
        "vllm:prompt_tokens_cached_total": 280,
        "vllm:generation_tokens_total": 400,
        "vllm:num_preemptions_total": 7,
        "vllm:prefix_cache_queries_total": 900,
        "vllm:prefix_cache_hits_total": 300,
        "vllm:admission_rejections_total": 4,
        "quire:steps_total": 50,
        "quire:failed_steps_total": 6,
        "quire:step_tokens_total": 1100,
        "quire:padded_tokens_total": 1300,
        "quire:compiles_after_ready": 0,
        "quire:engine_up": 1,
    }
    assert {name: found[name, ()] for name in expected} == expected
    for reason, count in {"stop": 5, "length": 3, "abort": 1, "error": 0}.items():
        assert found["vllm:request_success_total", (("finished_reason", reason),)] == count
    for part, seconds in {"plan": 0.5, "dispatch": 1.5, "collect": 2.5, "commit": 3.5}.items():
        assert found["quire:host_seconds_total", (("part", part),)] == seconds
    assert found["vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)] == 570
    assert found["vllm:prompt_tokens_by_source_total", (("source", "local_cache_hit"),)] == 280
    config = (("block_size", "16"), ("cache_dtype", "bfloat16"), ("num_gpu_blocks", "255"))
    assert found["vllm:cache_config_info", config] == 1
    assert any(name == "process_cpu_seconds_total" for name, _ in found)


def test_a_snapshot_that_lacks_an_entry_is_a_defect() -> None:
    with pytest.raises(KeyError, match="num_padded_tokens"):
        text_of(make_metrics({k: v for k, v in SNAPSHOT.items() if k != "num_padded_tokens"}))


def test_tokens_per_step_are_a_histogram() -> None:
    found = samples_of(make_metrics())
    for bound, count in {"1.0": 30, "8.0": 40, "64.0": 40, "128.0": 50, "+Inf": 50}.items():
        assert found["vllm:iteration_tokens_total_bucket", (("le", bound),)] == count
    assert found["vllm:iteration_tokens_total_sum", ()] == 30 + 80 + 1000
    assert found["vllm:iteration_tokens_total_count", ()] == 50


def test_a_streamed_request_feeds_the_histograms() -> None:
    metrics = make_metrics()
    gaps = [(0.75, 1), *[(0.1, 1)] * 7, (0.3, 3)]  # the last three tokens came together
    feed(metrics.requests, start_of(), gaps, end_of())
    found = samples_of(metrics)

    def of(name: str) -> tuple[float, float]:
        return found[f"vllm:{name}_count", ()], pytest.approx(found[f"vllm:{name}_sum", ()])

    assert of("time_to_first_token_seconds") == (1, 0.75)
    assert of("inter_token_latency_seconds") == (10, 1.0)
    assert of("request_time_per_output_token_seconds") == (1, 0.1)
    assert of("e2e_request_latency_seconds") == (1, 1.8)
    assert of("request_queue_time_seconds") == (1, 0.5)
    assert of("request_prefill_time_seconds") == (1, 0.2)
    assert of("request_decode_time_seconds") == (1, 1.0)
    assert of("request_inference_time_seconds") == (1, 1.2)
    assert of("request_prompt_tokens") == (1, 10)
    assert of("request_prefill_kv_computed_tokens") == (1, 6)
    assert of("request_generation_tokens") == (1, 11)
    assert of("request_max_num_generation_tokens") == (1, 11)
    assert of("request_params_n") == (1, 1)
    assert of("request_params_max_tokens") == (1, 16)
    assert of("request_num_preemptions") == (1, 1)
    assert found["vllm:time_to_first_token_seconds_bucket", (("le", "0.5"),)] == 0
    assert found["vllm:time_to_first_token_seconds_bucket", (("le", "0.75"),)] == 1  # bounds are inclusive


def test_an_answer_that_is_sent_whole_has_the_engines_times() -> None:
    """Not the time at which all of its tokens came out of the engine together."""
    metrics = make_metrics()
    feed(metrics.requests, start_of(stream=False), [(1.8, 11)], end_of(first_token_s=1.8))
    found = samples_of(metrics)
    assert found["vllm:time_to_first_token_seconds_sum", ()] == pytest.approx(0.7)
    assert found["vllm:inter_token_latency_seconds_count", ()] == 10
    assert found["vllm:inter_token_latency_seconds_sum", ()] == pytest.approx(1.0)


def test_completions_that_share_steps_share_gaps() -> None:
    metrics = make_metrics()
    params = SamplingParams(n=4, max_tokens=5, temperature=1.0, output_kind=RequestOutputKind.DELTA)
    feed(metrics.requests, start_of(params=params), [(0.5, 4), (0.1, 4), (0.2, 8), (0.1, 2)], end_of())
    found = samples_of(metrics)
    assert found["vllm:inter_token_latency_seconds_count", ()] == 14
    assert found["vllm:inter_token_latency_seconds_bucket", (("le", "0.15"),)] == 14
    assert found["vllm:inter_token_latency_seconds_bucket", (("le", "0.075"),)] == 0
    assert found["vllm:request_max_num_generation_tokens_count", ()] == 0


@pytest.mark.parametrize(
    "end",
    [
        end_of(status=500, error="a step failed", finish_reasons=("error",)),
        end_of(status=499, finish_reasons=("abort",)),
        end_of(status=503, output=None, error="the engine stopped", finish_reasons=("error",)),
    ],
)
def test_what_was_not_answered_is_in_no_histogram_of_whole_requests(end: RequestEnd) -> None:
    metrics = make_metrics()
    feed(metrics.requests, start_of(), [(0.5, 1)], end)
    found = samples_of(metrics)
    assert found["vllm:time_to_first_token_seconds_count", ()] == 1
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 0
    assert not metrics.requests._live


def test_an_embedding_has_no_tokens() -> None:
    metrics = make_metrics()
    feed(metrics.requests, start_of(params=None), [], end_of(num_output_tokens=0))
    found = samples_of(metrics)
    assert found["vllm:request_prompt_tokens_sum", ()] == 10
    assert found["vllm:request_generation_tokens_count", ()] == 0


def test_buckets_are_vllms() -> None:
    """They are part of the interface: dashboards and alerts name them."""
    found = samples_of(make_metrics())

    def bounds(name: str) -> list[float]:
        return sorted(float(dict(rest)["le"]) for n, rest in found if n == f"vllm:{name}_bucket")[:-1]

    assert bounds("time_to_first_token_seconds")[:8] == [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1]
    assert bounds("time_to_first_token_seconds")[-6:] == [20, 40, 80, 160, 640, 2560]
    assert bounds("e2e_request_latency_seconds") == sorted(REQUEST_S)
    assert bounds("inter_token_latency_seconds") == sorted(PER_TOKEN_S) and len(PER_TOKEN_S) == 19
    assert bounds("request_prompt_tokens") == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert token_bounds(999)[-1] == 500 and token_bounds(2000)[-1] == 2000


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain"),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", "text/plain"),
        ("application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5", "application/openmetrics"),
    ],
)
def test_both_formats_can_be_read(accept: str, kind: str) -> None:
    metrics = make_metrics()
    feed(metrics.requests, start_of(), [(0.75, 1)], end_of())
    body, content_type = asyncio.run(metrics.render(accept))
    assert content_type.startswith(kind)
    parse = parse_openmetrics if "openmetrics" in kind else text_string_to_metric_families
    families: list[Metric] = list(parse(body.decode()))
    assert len(families) > 40
    if "openmetrics" not in kind:
        names = {family.name for family in families}
        assert {"vllm:kv_cache_usage_perc", "quire:compiles_after_ready", "vllm:e2e_request_latency_seconds"} <= names


def test_promtool_accepts_the_text() -> None:
    """But for what vLLM's names bring: colons, and a histogram whose name ends in _total."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    metrics = make_metrics()
    feed(metrics.requests, start_of(), [(0.75, 1)], end_of())
    metrics.http._answers["/v1/completions", "POST", "200"] += 1
    metrics.requests.on_rejected("/v1/x", 401, "no key")
    run = subprocess.run([promtool, "check", "metrics"], input=text_of(metrics), capture_output=True, text=True)
    problems = [
        line
        for line in (run.stdout + run.stderr).splitlines()
        if "should not contain ':'" not in line and "vllm:iteration_tokens_total" not in line
    ]
    assert run.returncode in (0, 3) and problems == []
    broken = subprocess.run([promtool, "check", "metrics"], input="a{ 1\n", capture_output=True, text=True)
    assert broken.returncode == 1


def test_a_dead_engine_leaves_the_servers_own_metrics() -> None:
    client = SnapshotClient()
    client.dead = True
    text = text_of(Metrics(client, "tiny"))  # type: ignore[arg-type]
    assert 'quire:engine_up{engine="0",model_name="tiny"} 0.0' in text
    assert "process_cpu_seconds_total" in text and "vllm:num_requests_running" not in text


def test_requests_are_counted_by_endpoint_and_status() -> None:
    metrics = make_metrics()

    async def answer(request: web.Request) -> web.Response:
        if "fail" in request.query:
            raise ValueError("injected")
        if "slow" in request.query:
            await asyncio.sleep(60)
        raise web.HTTPBadRequest if "bad" in request.query else web.HTTPOk

    async def use() -> None:
        app = web.Application(middlewares=[metrics.http.middleware])
        app.router.add_get("/v1/models/{name}", answer)
        app.router.add_route(metrics.route.method, metrics.route.path, metrics.route.handler)
        async with TestServer(app, handler_cancellation=True) as server, ClientSession() as http:
            for path in ("a", "b", "c?bad", "d?fail"):
                async with http.get(server.make_url(f"/v1/models/{path}")):
                    pass
            for path in ("x", "y"):
                async with http.get(server.make_url(f"/unknown/{path}")):
                    pass
            with pytest.raises(asyncio.TimeoutError):
                async with asyncio.timeout(0.2), http.get(server.make_url("/v1/models/e?slow")):
                    pass
            await asyncio.sleep(0.05)
            async with http.get(server.make_url("/metrics")) as response:
                assert response.status == 200 and response.headers["Content-Type"].startswith("text/plain")
                assert "vllm:num_requests_running" in await response.text()

    asyncio.run(use())
    found = {rest: value for (name, rest), value in samples_of(metrics).items() if name == "http_requests_total"}

    def of(handler: str, status: str, method: str = "GET") -> float:
        return found[("handler", handler), ("method", method), ("status", status)]

    name = "/v1/models/{name}"
    assert (of(name, "200"), of(name, "400"), of(name, "500"), of(name, "499")) == (2, 1, 1, 1)
    assert of("unmatched", "404", "any") == 2
    assert len(found) == 6


def test_a_client_cannot_invent_labels() -> None:
    metrics = make_metrics()
    before = len(text_of(metrics).splitlines())
    for number in range(100):
        metrics.requests.on_rejected(f"/v1/{number}", 401, f"reason {number}")
    assert len(text_of(metrics).splitlines()) == before + 1


def test_observations_are_cheap() -> None:
    """A generous bound for a busy machine: prometheus_client's own histogram takes several times as long."""
    histogram, observer = Histogram("x", "x", PER_TOKEN_S), RequestMetrics(4096)
    for number in range(256):
        observer.on_start(start_of(f"req-{number}"))
    names, clock = [f"req-{number}" for number in range(256)], itertools.count(101)
    best = float("inf")
    for _ in range(5):
        started, now = time.perf_counter(), float(next(clock))
        for name in names:
            observer.on_tokens(name, 1, now)
        best = min(best, (time.perf_counter() - started) / len(names))
    assert best < 20e-6
    histogram.observe(0.1)
    assert re.fullmatch(r"\d+\.0", str(histogram.family({}).samples[-2].value))
