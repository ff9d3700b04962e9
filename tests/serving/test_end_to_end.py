"""The server with a real engine: a tiny golden model in a thread of its own, and (slow) in a process, and the demo."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import uvloop
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from engine.client import EngineClient
from serving.backend import create_client
from serving.commands.serve import compose
from serving.http.server import HttpServer
from serving.http.settings import ServerSettings
from tests.engine.conftest import compilation_cache  # noqa: F401 - a fixture
from tests.engine.helpers import SMALL, TINY, golden_prompts

MODEL = TINY / "llama"


@asynccontextmanager
async def live(tmp_path: Path, *, process: bool, model: str = str(MODEL), **settings: Any) -> AsyncIterator[Any]:
    """A server of a real engine: its URL and its engine."""
    every = {**SMALL, "compilation_cache_dir": str(tmp_path), **settings}
    engine = cast(EngineClient, await create_client(model, process=process, **every))
    served = compose(engine, ServerSettings(port=0, request_log=False))
    server = HttpServer(served.app)
    url = await server.start()
    try:
        yield url, engine
    finally:
        await server.stop()
        served.watching.close()
        await engine.close()


async def _scenario(url: str, engine: EngineClient) -> None:
    golden = golden_prompts(MODEL)
    async with AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        name = (await client.models.list()).data[0].id
        extra = {"return_token_ids": True, "ignore_eos": True}

        async def complete(number: int, stream: bool) -> list[int]:
            prompt, length = golden[number].prompt, min(8, len(golden[number].continuation))
            options: Any = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": length}
            if not stream:
                answer = await client.completions.create(**options, extra_body=extra)
                return answer.choices[0].token_ids  # type: ignore[attr-defined]
            tokens: list[int] = []
            async for chunk in await client.completions.create(**options, extra_body=extra, stream=True):
                tokens += chunk.choices[0].token_ids  # type: ignore[attr-defined]
            return tokens

        usable = [i for i, g in enumerate(golden) if len(g.prompt) < 100]
        for stream in (False, True):
            found = await asyncio.gather(*[complete(number, stream) for number in usable])
            assert found == [golden[number].continuation[:8] for number in usable], "as the golden model says"
        chat: Any = {"model": name, "messages": [{"role": "user", "content": "hello there"}], "seed": 3}
        whole = await client.chat.completions.create(**chat, max_tokens=12, logprobs=True, top_logprobs=2)
        pieces = [c async for c in await client.chat.completions.create(**chat, max_tokens=12, stream=True)]
        assert "".join(c.choices[0].delta.content or "" for c in pieces) == whole.choices[0].message.content
    async with aiohttp.ClientSession() as session:
        body = {"prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 120}
        async with session.post(url + "/v1/completions", json=body) as response:
            await response.content.readline()
        async with session.get(url + "/health") as response:
            assert response.status == 200
        await _look_inside(session, url)

    async def used() -> float:
        return (await engine.snapshot())["num_running"]

    async with asyncio.timeout(10):
        while await used():
            await asyncio.sleep(0.01)


async def _metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(url + "/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    return {sample.name: sample.value for family in families for sample in family.samples}


async def _look_inside(session: aiohttp.ClientSession, url: str) -> None:
    """Timeline and metrics of a request that the test knows."""
    before = await _metrics(session, url)
    body = {"prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True, "request_id": "look"}
    async with session.post(url + "/v1/completions", json=body) as response:
        name = (await response.json())["id"]
    async with session.get(f"{url}/requests/{name}/timeline") as response:
        timeline = await response.json()
    assert timeline["status"] == "finished" and timeline["finish_reason"] == "length"
    assert timeline["num_prompt_tokens"] == 3 and timeline["num_output_tokens"] == 5
    steps = timeline["steps"]
    assert steps[0]["num_prompt_tokens"] == 3 and sum(step["num_tokens"] for step in steps) == 7
    async with session.get(f"{url}/requests/nobody/timeline") as response:
        assert response.status == 404 and (await response.json())["error"]["param"] == "request_id"
    samples = await _metrics(session, url)
    # The count is the process's: other tests compile there too, but for an engine in a process of its own.
    assert samples["quire:compiles_after_ready"] == before["quire:compiles_after_ready"]
    assert samples["quire:engine_up"] == 1
    assert samples["vllm:generation_tokens_total"] > 5 and samples["vllm:request_generation_tokens_count"] > 0
    assert samples["quire:padded_tokens_total"] >= samples["quire:step_tokens_total"] > 0


def test_a_tiny_model_in_a_thread(compilation_cache: str) -> None:  # noqa: F811
    async def run() -> None:
        async with live(Path(compilation_cache), process=False) as (url, engine):
            await _scenario(url, engine)

    uvloop.run(run())


@pytest.mark.slow
def test_a_tiny_model_in_a_process(tmp_path: Path) -> None:
    async def run() -> None:
        async with live(tmp_path, process=True) as (url, engine):
            await _scenario(url, engine)

    uvloop.run(run())


@pytest.mark.slow
def test_the_demo_model(tmp_path: Path) -> None:
    async def run() -> None:
        settings = {"max_model_len": 256, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 128}
        async with live(tmp_path, process=True, model="demo", **settings) as (url, _):
            async with AsyncOpenAI(base_url=url + "/v1", api_key="x") as client:
                question: Any = [{"role": "user", "content": "What is the capital of France?"}]
                answer = await client.chat.completions.create(model="demo", messages=question, temperature=0)
            assert "Paris" in (answer.choices[0].message.content or "")

    uvloop.run(run())


@pytest.mark.slow
def test_a_thousand_aborted_streams_leave_no_block(tmp_path: Path) -> None:
    async def one(session: aiohttp.ClientSession, url: str, number: int) -> None:
        body = {"prompt": [3 + number % 300] * 20, "stream": number % 3 > 0, "ignore_eos": True, "max_tokens": 100}
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with session.post(
                url + "/v1/completions", json=body, timeout=aiohttp.ClientTimeout(0.01 + number % 7 * 0.02)
            ) as response:
                await response.content.read(number % 5 * 300 + 1)

    async def run() -> None:
        async with live(tmp_path, process=True) as (url, engine):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64)) as session:
                await asyncio.gather(*[one(session, url, number) for number in range(1000)])
            async with asyncio.timeout(30):
                while (now := await engine.snapshot())["num_running"] or now["num_waiting"] or now["kv_cache_usage"]:
                    await asyncio.sleep(0.05)
            await _scenario(url, engine)

    uvloop.run(run())
