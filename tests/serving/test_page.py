"""`GET /` and `GET /engine/steps` without a browser."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from engine.client import StepEvent
from serving.endpoints.page import FILE, load_page
from tests.serving.fakes import FakeEngine, serving


def test_the_page_is_small_and_needs_nothing_else() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert text.count("\n") < 1000
    outside = [url for url in re.findall(r"https?://[^\s\"')]+", text) if not url.startswith("http://www.w3.org/")]
    assert outside == []
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=", "onclick="):
        assert forbidden not in text, f"{forbidden} would let a text become more than text, or break the policy"


def test_its_headers_and_its_tag() -> None:
    async def run() -> None:
        async with serving(api_key=["k"]) as (client, _):
            response = await client.get("/")
            assert response.status == 200 and response.content_type == "text/html"
            assert await response.read() == load_page().body
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src 'self'" in policy
            assert "unsafe" not in policy and "http" not in policy
            tag = response.headers["ETag"]
            again = await client.get("/", headers={"If-None-Match": tag})
            assert again.status == 304 and await again.read() == b"" and again.headers["ETag"] == tag
            assert (await client.get("/", headers={"If-None-Match": '"old"'})).status == 200

    asyncio.run(run())


def step(index: int, duration_s: float | None = 0.01) -> StepEvent:
    return StepEvent(index, 5.0 + index, duration_s, 3, 2, 1, 4)


def test_steps_are_given_from_where_the_reader_stands() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as (client, _):

            async def ask(since: str | None) -> dict:
                response = await client.get("/engine/steps", params={} if since is None else {"since": since})
                assert response.status == 200
                return await response.json()

            empty = await ask(None)
            assert empty["steps"] == [] and empty["next_since"] == 0 and not empty["reset"]
            assert (empty["model"], empty["max_num_seqs"], empty["num_running"]) == ("tiny", 64, 0)
            assert empty["prefix_hit_rate"] is None and empty["device"] is None
            engine.steps += [step(0), step(1), step(2, None), step(3, None)]
            first = await ask("0")
            assert [s["step_id"] for s in first["steps"]] == [0, 1, 2, 3]
            assert first["steps"][0] == {
                "step_id": 0,
                "time": 5.0,
                "duration_s": 0.01,
                "num_tokens": 3,
                "num_seqs": 2,
                "num_prompt_tokens": 1,
                "padded_tokens": 4,
            }
            assert first["next_since"] == 2, "steps that run are asked for again"
            engine.steps[2:] = [step(2), step(3)]
            later = await ask("2")
            assert [s["step_id"] for s in later["steps"]] == [2, 3] and later["next_since"] == 4
            assert (await ask("4"))["next_since"] == 4 and not (await ask("4"))["reset"]
            engine.steps[:] = [step(0)]
            anew = await ask("4")
            assert anew["reset"] and [s["step_id"] for s in anew["steps"]] == [0] and anew["next_since"] == 1

    asyncio.run(run())


def test_a_step_that_failed_is_not_waited_for() -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.steps += [step(0, None), *(step(index) for index in range(1, 8))]
        async with serving(engine) as (client, _):
            assert (await (await client.get("/engine/steps")).json())["next_since"] == 8

    asyncio.run(run())


@pytest.mark.parametrize("since", ["-1", "x", "1.5", "", "9" * 30, "²"])
def test_a_wrong_since_is_refused(since: str) -> None:
    async def run() -> None:
        async with serving() as (client, _):
            response = await client.get("/engine/steps", params={"since": since})
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "since"

    asyncio.run(run())


def test_the_page_is_in_the_package() -> None:
    assert FILE.is_relative_to(Path(__file__).parents[2] / "serving")
