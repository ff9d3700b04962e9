"""The soak tells a sound server from one that loses requests, leaks or lies."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.server_process import cpu_s, descendants, rss_mib
from benchmarks.soak.report import Soak, markdown, write
from benchmarks.soak.traffic import Job, Outcome, next_job, run_job
from benchmarks.soak.watch import Sample, grows, read_metrics

QUIET = {"running": 0.0, "waiting": 0.0, "kv_usage": 0.0, "preemptions": 0.0, "generated": 9.0, "compiles": 0.0}
FACTS = {
    "date": "2026-01-02",
    "model": "demo",
    "concurrency": 2,
    "commit": "abc",
    "machine": {"processor": "some", "cpu_count": 2},
    "command": "python -m benchmarks.soak",
}


def memory(values: Sequence[float]) -> list[Sample]:
    """Samples at equal distances."""
    return [Sample(5.0 * (i + 1), value, QUIET) for i, value in enumerate(values)]


def soak(**changes: Any) -> Soak:
    """A soak without faults, but for what is changed."""
    parts: dict[str, Any] = {
        "outcomes": [Outcome("chat", "result"), Outcome("bad", "error"), Outcome("left midway", "left")],
        "samples": memory([900.0] * 40),
        "after": Sample(1.0, 900.0, QUIET),
        "exit_code": 0,
        "facts": FACTS,
    }
    return Soak(**(parts | changes))


def test_sound() -> None:
    assert soak().faults() == []
    assert "None." in markdown(soak())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcomes": [Outcome("chat", "lost", "no end")]}, "lost: no end"),
        ({"outcomes": [Outcome("chat", "wrong", "status 500")]}, "status 500"),
        ({"after": Sample(1.0, 900.0, QUIET | {"kv_usage": 0.25})}, "kv_usage is 0.25"),
        ({"after": Sample(1.0, 900.0, QUIET | {"running": 1.0})}, "running is 1"),
        ({"after": Sample(1.0, 900.0, QUIET | {"compiles": 2.0})}, "compiles is 2"),
        ({"samples": memory([900.0 + 3 * i for i in range(40)])}, "memory grows"),
        ({"exit_code": None}, "exit code None"),
    ],
)
def test_faults(changes: dict[str, Any], said: str) -> None:
    assert any(said in fault for fault in soak(**changes).faults())
    assert said in markdown(soak(**changes))


def test_warm_up_is_no_leak() -> None:
    assert not grows(memory([100.0, 300.0, 500.0, 600.0] + [800.0] * 36))
    assert not grows(memory([800.0 + i % 5 for i in range(40)]))


def test_written(tmp_path) -> None:
    write(soak(), tmp_path)
    assert json.loads((tmp_path / "soak.json").read_text())["faults"] == []
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_own_memory_and_time() -> None:
    assert os.getpid() in descendants(os.getppid())
    assert rss_mib([os.getpid()]) > 20
    assert 0 < cpu_s(os.getpid()) < 24 * 3600


def test_mix_reaches_every_kind() -> None:
    rng = random.Random(1)
    jobs = [next_job(rng, "m") for _ in range(2000)]
    assert {job.kind for job in jobs} == {
        "completion", "chat", "structured", "shared prefix", "embedding", "left midway", "bad",
    }  # fmt: skip
    assert {job.leave_after for job in jobs} > {None, 0, 1}


def _chunk(text: str, reason: str | None = None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


DONE = "data: [DONE]\n\n"
STREAMS = {
    "good": (_chunk("a") + _chunk("b", "stop") + DONE, "result"),
    "cut": (_chunk("a"), "lost"),
    "no reason": (_chunk("a") + DONE, "lost"),
    "aborted": (_chunk("a", "abort") + DONE, "wrong"),
    "error": (_chunk("a") + 'data: {"error": {"message": "x"}}\n\n' + DONE, "wrong"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams(name: str) -> None:
    body, expected = STREAMS[name]

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body.encode(), content_type="text/event-stream")

    assert asyncio.run(_outcome(handler, Job("completion", "/v1/completions", {"stream": True}))).result == expected


@pytest.mark.parametrize(
    ("status", "body", "expected", "result"),
    [
        (200, {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}, 200, "result"),
        (200, {"choices": [{"index": 0, "text": "x", "finish_reason": None}]}, 200, "wrong"),
        (500, {"error": {}}, 200, "wrong"),
        (503, {"error": {}}, 200, "busy"),
        (400, {"error": {"message": "m", "type": "t", "param": None, "code": 400}}, 400, "error"),
        (400, {"detail": "m"}, 400, "wrong"),
        (200, {"choices": []}, 400, "wrong"),
    ],
)
def test_whole_answers(status: int, body: dict[str, Any], expected: int, result: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status)

    job = Job("completion", "/v1/completions", {"prompt": "x"}, expected=expected)
    assert asyncio.run(_outcome(handler, job)).result == result


def test_leaves_midway() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(_chunk("x").encode())
            await asyncio.sleep(0)

    job = Job("left midway", "/v1/completions", {"stream": True}, leave_after=2)
    assert asyncio.run(_outcome(handler, job)).result == "left"


def test_reads_metrics() -> None:
    text = "\n".join(
        [
            "# TYPE vllm:num_requests_running gauge",
            'vllm:num_requests_running{model_name="m",engine="0"} 3.0',
            "# TYPE vllm:num_requests_waiting gauge",
            'vllm:num_requests_waiting{model_name="m"} 1.0',
            "# TYPE vllm:kv_cache_usage_perc gauge",
            'vllm:kv_cache_usage_perc{model_name="m"} 0.5',
            "# TYPE vllm:num_preemptions counter",
            'vllm:num_preemptions_total{model_name="m"} 2.0',
            "# TYPE vllm:generation_tokens counter",
            'vllm:generation_tokens_total{model_name="m"} 70.0',
            "# TYPE quire:compiles_after_ready gauge",
            "quire:compiles_after_ready 0.0",
            "",
        ]
    )

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text=text)

    async def run() -> dict[str, float]:
        async with _serve("/metrics", handler, "GET") as server, aiohttp.ClientSession() as session:
            return await read_metrics(session, str(server.make_url("")).rstrip("/"))

    assert asyncio.run(run()) == {
        "running": 3.0, "waiting": 1.0, "kv_usage": 0.5, "preemptions": 2.0, "generated": 70.0, "compiles": 0.0,
    }  # fmt: skip


def _serve(path: str, handler: Any, method: str) -> TestServer:
    app = web.Application()
    app.router.add_route(method, path, handler)
    return TestServer(app)


async def _outcome(handler: Any, job: Job) -> Outcome:
    async with _serve(job.path, handler, "POST") as server, aiohttp.ClientSession() as session:
        return await run_job(session, str(server.make_url("")).rstrip("/"), job)
