"""What waits for a slow consumer is one output, and the sum of all outputs is what the engine gave."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineDeadError
from engine.outputs import CompletionOutput, Logprob, RequestOutput
from engine.stream import OutputStream


def delta(
    parts: Sequence[tuple[str, int]], finished: bool = False, *, cached: int = 0, logprobs: bool = False
) -> RequestOutput:
    """An output with one new token per completion, as (text, token id); an empty text is a completion without news."""
    return RequestOutput(
        request_id="r",
        prompt="p",
        prompt_token_ids=(1,),
        outputs=[
            CompletionOutput(
                index,
                text,
                (token,) if text else (),
                cumulative_logprob=-float(token) if logprobs else None,
                logprobs=([{token: Logprob(-1.0, 1, text)}] if text else []) if logprobs else None,
                finish_reason="length" if finished else None,
            )
            for index, (text, token) in enumerate(parts)
        ],
        finished=finished,
        num_cached_tokens=cached,
    )


def run_bounded(coroutine: object) -> object:
    async def bounded() -> object:
        async with asyncio.timeout(20):
            return await coroutine  # type: ignore[misc]

    return asyncio.run(bounded())


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.booleans(), st.integers(1, 3), st.booleans())
def test_whatever_the_pace_nothing_is_lost(reads: list[bool], cumulative: bool, n: int, logprobs: bool) -> None:
    """`reads`: whether the consumer looks after each output."""
    deltas = [
        delta([(chr(97 + (i + j) % 26) if (i + j) % 3 else "", i) for j in range(n)], i == len(reads) - 1, cached=i,
              logprobs=logprobs)
        for i in range(len(reads))
    ]  # fmt: skip

    async def scenario() -> list[RequestOutput]:
        stream, seen = OutputStream(cumulative=cumulative), []
        for output, read in zip(deltas, reads, strict=True):
            stream.put(output)
            if read or output.finished:
                seen.append(await stream.get())
        return seen

    seen = run_bounded(scenario())
    assert isinstance(seen, list) and len(seen) == sum(reads[:-1]) + 1
    assert seen[-1].finished and seen[-1].num_cached_tokens == len(reads) - 1
    for j in range(n):
        text = "".join(d.outputs[j].text for d in deltas)
        tokens = [t for d in deltas for t in d.outputs[j].token_ids]
        last = seen[-1].outputs[j]
        assert last.finish_reason == "length" and last.index == j
        if cumulative:
            assert last.text == text and list(last.token_ids) == tokens
            assert all(text.startswith(o.outputs[j].text) for o in seen)
            assert not logprobs or [next(iter(p)) for p in last.logprobs or []] == tokens
        else:
            assert "".join(o.outputs[j].text for o in seen) == text
            assert [t for o in seen for t in o.outputs[j].token_ids] == tokens
            assert not logprobs or [t for o in seen for p in o.outputs[j].logprobs or [] for t in p] == tokens
        assert last.cumulative_logprob == (-float(len(reads) - 1) if logprobs else None)


def test_a_consumer_that_keeps_up_gets_the_outputs_themselves() -> None:
    async def scenario() -> None:
        stream = OutputStream(cumulative=False)
        for i in range(3):
            output = delta([("a", i)])
            stream.put(output)
            assert await stream.get() is output

    run_bounded(scenario())


def test_the_early_end_of_one_completion_is_not_lost() -> None:
    async def scenario() -> RequestOutput:
        stream = OutputStream(cumulative=False)
        first = delta([("a", 1), ("b", 2)])
        ended = CompletionOutput(0, "", (), finish_reason="stop", stop_reason=7)
        stream.put(first)
        stream.put(RequestOutput("r", "p", (1,), [ended], False))
        stream.put(RequestOutput("r", "p", (1,), [CompletionOutput(1, "c", (3,))], False))
        return await stream.get()

    output = run_bounded(scenario())
    assert isinstance(output, RequestOutput)
    assert [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs] == [
        ("a", (1,), "stop", 7),
        ("bc", (2, 3), None, None),
    ]


def test_an_error_comes_after_what_waits() -> None:
    async def scenario() -> None:
        stream = OutputStream(cumulative=False)
        stream.put(delta([("a", 1)]))
        stream.fail(EngineDeadError("gone"))
        assert (await stream.get()).outputs[0].text == "a"
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="gone"):
                await stream.get()

    run_bounded(scenario())


def test_a_waiting_consumer_wakes() -> None:
    async def scenario() -> None:
        for fail in (False, True):
            stream = OutputStream(cumulative=False)
            task = asyncio.create_task(stream.get())
            await asyncio.sleep(0)
            if fail:
                stream.fail(EngineDeadError("gone"))
                with pytest.raises(EngineDeadError):
                    await task
            else:
                stream.put(delta([("a", 1)]))
                assert (await task).outputs[0].text == "a"
        cancelled = asyncio.create_task(stream.get())
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    run_bounded(scenario())
