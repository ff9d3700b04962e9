"""A stream says the same as a whole answer, whatever is asked for and however the tokens come."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from tests.serving import test_chat, test_completions
from tests.serving.fakes import FakeEngine, Script, post, serving, stream

TEXTS = st.text(alphabet='ab ,é日🦊\n"\\\u2028', min_size=1, max_size=24)
CUTS = st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 40),
    "stop": st.sampled_from([["a"], ["ab", "b,"], "é日", ["🦊"], [" ,"]]),
    "include_stop_str_in_output": st.booleans(),
    "return_token_ids": st.just(True),
    "return_tokens_as_token_ids": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.just(True), "continuous_usage_stats": st.booleans()}),
}


async def _both(path: str, script: Script, body: dict[str, Any]) -> tuple[Any, list[Any]]:
    async with asyncio.timeout(30):
        async with serving(FakeEngine(script, defaults=SamplingParams())) as (client, engine):
            whole = {name: value for name, value in body.items() if name != "stream_options"}
            status, answer = await post(client, path, whole)
            assert status == 200, answer
            events = await stream(client, path, body)
            assert engine.live == {} and engine.aborted == []
    if "stream_options" in body:
        assert events[-1]["usage"] == answer["usage"] and events[-1]["choices"] == []
    return answer, events


@settings(max_examples=60)
@given(
    st.one_of(st.none(), TEXTS),
    CUTS,
    st.fixed_dictionaries({"prompt": st.sampled_from(["x", ["x", "é"], [5, 6], [[5], [6, 7], [8]]])}).flatmap(
        lambda fixed: st.fixed_dictionaries(
            {name: st.just(value) for name, value in fixed.items()},
            optional={**COMMON, "echo": st.booleans(), "logprobs": st.integers(0, 2)},
        )
    ),
)
def test_completions_stream_what_they_answer(text: str | None, cuts: list[int], body: dict[str, Any]) -> None:
    answer, events = asyncio.run(_both("/v1/completions", Script(text, tuple(cuts)), body))
    streamed = test_completions.joined(events)
    assert sorted(streamed) == [choice["index"] for choice in answer["choices"]]
    for choice in answer["choices"]:
        assert streamed[choice["index"]] == choice


@settings(max_examples=60)
@given(
    st.one_of(st.none(), TEXTS),
    CUTS,
    st.fixed_dictionaries(
        {"messages": st.just([{"role": "user", "content": "hi"}])},
        optional={**COMMON, "logprobs": st.booleans()},
    ),
)
def test_chats_stream_what_they_answer(text: str | None, cuts: list[int], body: dict[str, Any]) -> None:
    answer, events = asyncio.run(_both("/v1/chat/completions", Script(text, tuple(cuts)), body))
    streamed = test_chat.joined(events)
    assert sorted(streamed) == [choice["index"] for choice in answer["choices"]]
    for choice in answer["choices"]:
        parts = streamed[choice["index"]]
        assert parts["content"] == choice["message"]["content"]
        assert parts["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
        assert parts["token_ids"] == choice.get("token_ids", [])
        assert (parts["finish_reason"], parts["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
