"""`/v1/embeddings`: vectors, forms, faults; and the engine's own numbers through thread and process."""

from __future__ import annotations

import base64
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from openai import AsyncOpenAI

from serving.http.observer import RequestEnd, RequestStart
from tests.engine.conftest import compilation_cache  # noqa: F401 - a fixture
from tests.serving.fakes import FakeEngine, async_test, serving
from tests.serving.test_end_to_end import live


async def post(client: Any, **body: Any) -> tuple[int, dict[str, Any]]:
    """The status and the body of an answer."""
    async with client.post("/v1/embeddings", json=body) as response:
        return response.status, await response.json()


@async_test
async def test_one_vector_per_input() -> None:
    async with serving() as (client, engine):
        status, one = await post(client, input=[3, 4, 5], normalize=False)
        assert status == 200 and one["object"] == "list" and one["id"].startswith("embd-")
        assert one["data"] == [{"object": "embedding", "index": 0, "embedding": [3.0, 4.0, 5.0, 0, 0, 0, 0, 0]}]
        assert one["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        _, many = await post(client, input=[[3, 4], [5, 6, 7]], normalize=False)
        assert [d["index"] for d in many["data"]] == [0, 1] and many["usage"]["prompt_tokens"] == 5
        assert many["data"][1]["embedding"][:3] == [5.0, 6.0, 7.0]
        _, texts = await post(client, input=["a", "b c"])
        assert len(texts["data"]) == 2
        assert sum(x * x for x in texts["data"][1]["embedding"]) == pytest.approx(1.0)


@async_test
async def test_base64_holds_the_same_numbers() -> None:
    async with serving() as (client, _):
        _, plain = await post(client, input=[3, 4, 5])
        _, packed = await post(client, input=[3, 4, 5], encoding_format="base64")
        numbers = array("f", base64.b64decode(packed["data"][0]["embedding"]))
        assert list(numbers) == pytest.approx(plain["data"][0]["embedding"], rel=1e-6)


@async_test
async def test_truncation_keeps_the_end() -> None:
    async with serving() as (client, _):
        _, cut = await post(client, input=[3, 4, 5, 6], truncate_prompt_tokens=2, normalize=False)
        assert cut["data"][0]["embedding"][:2] == [5.0, 6.0] and cut["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "prompt"),
        ({"input": [10**9]}, 400, "prompt"),
        ({"input": {"a": 1}}, 400, None),
        ({"input": [[3]] * 1025}, 400, None),
        ({"dimensions": 3}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"pooling": "max"}, 400, "pooling"),
        ({"model": "other"}, 404, "model"),
        ({"messages": [{"role": "user", "content": "x"}]}, 400, "messages"),
        ({"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    ],
)
@async_test
async def test_faults(change: dict[str, Any], status: int, param: str | None) -> None:
    async with serving() as (client, _):
        found, body = await post(client, **({"input": [3, 4]} | change))
        assert found == status, body
        assert set(body["error"]) == {"message", "type", "param", "code"}
        if param is not None:
            assert body["error"]["param"] == param


class _Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.starts: list[RequestStart] = []
        self.ends: list[RequestEnd] = []
        self.refused: list[int] = []

    def on_start(self, start: RequestStart) -> None:
        self.starts.append(start)

    def on_tokens(self, request_id: str, num_tokens: int, time: float) -> None:
        raise AssertionError("an embedding has no tokens")

    def on_end(self, end: RequestEnd) -> None:
        self.ends.append(end)

    def on_rejected(self, endpoint: str, status: int, reason: str) -> None:
        self.refused.append(status)


@async_test
async def test_observers_hear_of_each_once() -> None:
    notes = _Notes()
    async with serving(FakeEngine(), prepare=lambda context: replace(context, observers=(notes,))) as (client, _):
        await post(client, input=[[3, 4], [5]])
        assert [s.num_prompt_tokens for s in notes.starts] == [2, 1] and notes.starts[0].params is None
        assert [(e.status, e.finish_reasons, e.num_output_tokens) for e in notes.ends] == [(200, ("stop",), 0)] * 2
        await post(client, input=[10**9])
        assert notes.refused == [400] and len(notes.ends) == 2


async def _check_engine(url: str, engine: Any) -> None:
    async with AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        name = (await client.models.list()).data[0].id
        prompts = [[5, 6, 7, 8], list(range(3, 60))]
        for pooling in ("last", "mean"):
            answer = await client.embeddings.create(
                model=name, input=prompts, encoding_format="float", extra_body={"pooling": pooling}
            )
            for prompt, item in zip(prompts, answer.data, strict=True):
                wanted = await engine.embed(prompt, pooling=pooling)
                assert item.embedding == pytest.approx(wanted.embedding, abs=1e-5)
                assert len(item.embedding) == engine.info.embedding_size
        packed = await client.embeddings.create(model=name, input=prompts)  # the client asks for base64
        assert packed.data[0].embedding == pytest.approx((await engine.embed(prompts[0])).embedding, abs=1e-5)


def test_a_tiny_model_in_a_thread(compilation_cache: str) -> None:  # noqa: F811
    async def run() -> None:
        async with live(Path(compilation_cache), process=False) as (url, engine):
            await _check_engine(url, engine)

    uvloop.run(run())


@pytest.mark.slow
def test_a_tiny_model_in_a_process(tmp_path: Path) -> None:
    async def run() -> None:
        async with live(tmp_path, process=True) as (url, engine):
            await _check_engine(url, engine)

    uvloop.run(run())
