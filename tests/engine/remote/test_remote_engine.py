"""`RemoteEngine` gives what `Engine` gives, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop

from engine.client import EngineClient
from engine.errors import ContextLengthError, InvalidRequestError
from engine.input_processor import InputProcessor
from engine.outputs import RequestOutput
from engine.remote import wire
from engine.remote.client import RemoteEngine
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.structured.params import StructuredOutputsParams
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import SMALL, TINY, golden_prompts, tokens_of
from tests.engine.remote.support import DELTAS, MODEL, bounded, collect, cpu_seconds

Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all tests: an engine lives in the loop that it was started in."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner, compilation_cache: str) -> Iterator[RemoteEngine]:
    """One for all tests."""
    engine = runner.run(RemoteEngine.start(MODEL, compilation_cache_dir=compilation_cache, **SMALL))
    yield engine
    runner.run(engine.close())


@pytest.fixture
def run(runner: asyncio.Runner, engine: RemoteEngine) -> Run:
    """Run a scenario; afterwards nothing may be left of any request, in either process."""

    async def settled(scenario: Callable[[], Awaitable[None]]) -> None:
        await scenario()
        while (state := await engine.snapshot())["num_running"] or state["num_waiting"] or state["num_in_flight"]:
            await asyncio.sleep(0.005)
        assert state["num_free_blocks"] == engine.info.num_kv_blocks and state["kv_cache_usage"] == 0.0
        exchange = engine._exchange
        assert not exchange._live and not exchange._ids and not exchange._asked

    return lambda scenario: runner.run(bounded(lambda: settled(scenario)))


def test_it_is_a_client(engine: RemoteEngine) -> None:
    client: EngineClient = engine
    assert client.info.num_kv_blocks == 255 and client.info.max_model_len == 128 and not client.info.priorities
    assert client.info.vocab_size == 320 and client.info.eos_token_ids == (2,)
    assert client.info.description["dtype"] == "float32"
    assert client.tokenizer is not None and client.tokenizer.encode("hello")


def test_embeddings_and_grammars_cross_the_border(engine: RemoteEngine, shelf: EngineShelf, run: Run) -> None:
    prompt = golden_prompts(TINY / "llama")[0].prompt
    local = shelf.take()
    [expected] = local.embed([prompt], pooling="mean")

    async def scenario() -> None:
        output = await engine.embed(prompt, pooling="mean")
        assert output.embedding == pytest.approx(expected.embedding, abs=1e-6)
        assert output.num_prompt_tokens == len(prompt) and output.metrics is not None
        with pytest.raises(InvalidRequestError, match="pooling"):
            await engine.embed(prompt, pooling="max")  # type: ignore[arg-type]
        following = DELTAS.replace(structured_outputs=StructuredOutputsParams(regex="[ab]{3}"), ignore_eos=False)
        text = "".join([o.outputs[0].text async for o in engine.generate(prompt, following)])
        assert re.fullmatch("[ab]{3}", text)
        wrong = DELTAS.replace(structured_outputs=StructuredOutputsParams(regex="("))
        with pytest.raises(InvalidRequestError) as caught:
            await collect(engine.generate(prompt, wrong))
        assert caught.value.parameter == "structured_outputs"

    run(scenario)


def test_many_streams_equal_the_engine(engine: RemoteEngine, shelf: EngineShelf, run: Run) -> None:
    """Forty requests that start at different times, of all output kinds."""
    golden = golden_prompts(TINY / "llama")
    fields = [
        {"temperature": 0.0},
        {"seed": 3, "stop": ["e"], "include_stop_str_in_output": True},
        {"seed": 4, "n": 2, "logit_bias": {40: 3.0}},
        {"seed": 5, "presence_penalty": 1.0, "logprobs": 1, "prompt_logprobs": 2},
    ]
    plain = SamplingParams(max_tokens=12, ignore_eos=True)
    jobs = [(golden[i % 5].prompt[: 5 + i], plain.replace(**fields[i % 4])) for i in range(40)]
    expected = shelf.take().generate([p for p, _ in jobs], [q for _, q in jobs])
    kinds = list(RequestOutputKind)

    async def one(index: int) -> list[RequestOutput]:
        prompt, params = jobs[index]
        await asyncio.sleep(0.002 * (index % 7))
        return await collect(engine.generate(prompt, params.replace(output_kind=kinds[index % 3])))

    async def scenario() -> None:
        results = await asyncio.gather(*(one(i) for i in range(len(jobs))))
        for index, (outputs, alone) in enumerate(zip(results, expected, strict=True)):
            assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
            last, kind = outputs[-1], kinds[index % 3]
            assert list(last.prompt_token_ids) == jobs[index][0]
            if alone.prompt_logprobs is not None:
                assert last.prompt_logprobs is not None and len(last.prompt_logprobs) == len(last.prompt_token_ids)
            if kind is RequestOutputKind.DELTA:
                for i, completion in enumerate(alone.outputs):
                    assert "".join(o.outputs[i].text for o in outputs) == completion.text
                    assert tuple(t for o in outputs for t in o.outputs[i].token_ids) == completion.token_ids
                    assert last.outputs[i].finish_reason == completion.finish_reason
            else:
                assert tokens_of(last) == tokens_of(alone)
                assert [c.text for c in last.outputs] == [c.text for c in alone.outputs]
                for mine, theirs in zip(last.outputs, alone.outputs, strict=True):
                    assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-3)
                    assert (mine.logprobs is None) == (theirs.logprobs is None)
            assert last.metrics is not None and last.metrics.num_generation_tokens == sum(
                len(c.token_ids) for c in alone.outputs
            )

    run(scenario)


def test_text_and_default_parameters(engine: RemoteEngine, run: Run) -> None:
    async def scenario() -> None:
        outputs = await collect(engine.generate("hello there"))
        assert outputs[-1].prompt == "hello there" and engine.tokenizer is not None
        assert list(outputs[-1].prompt_token_ids) == engine.tokenizer.encode("hello there")
        assert sum(len(o.outputs[0].token_ids) for o in outputs) <= 16

    run(scenario)


def test_seeds_that_nobody_gave_are_the_engines(
    engine: RemoteEngine, shelf: EngineShelf, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are drawn on this side, in order of arrival: the same as in a process of one's own."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = [[5 + i] * 6 for i in range(6)]
    here = shelf.take()
    assert here._built is not None
    limits, tokenizer = here._built.inputs.limits, here._built.tokenizer
    monkeypatch.setattr(here._built.inputs, "_seeds", InputProcessor(limits, tokenizer, 77)._seeds)
    monkeypatch.setattr(engine, "_inputs", InputProcessor(limits, tokenizer, 77))
    expected = here.generate(prompts, params)

    async def scenario() -> None:
        results = await asyncio.gather(*(collect(engine.generate(p, params)) for p in prompts))
        assert [tokens_of(outputs[-1]) for outputs in results] == [tokens_of(output) for output in expected]

    run(scenario)


def test_a_slow_consumer_gets_merged_deltas(engine: RemoteEngine, shelf: EngineShelf, run: Run) -> None:
    params = DELTAS.replace(max_tokens=60)
    alone = shelf.take().generate([5, 6], params)[0].outputs[0]

    async def scenario() -> None:
        outputs = []
        async for output in engine.generate([5, 6], params):
            outputs.append(output)
            while (await engine.snapshot())["num_running"]:
                await asyncio.sleep(0.005)
        assert len(outputs) <= 3
        assert tuple(t for o in outputs for t in o.outputs[0].token_ids) == alone.token_ids
        assert "".join(o.outputs[0].text for o in outputs) == alone.text

    run(scenario)


BAD_REQUESTS = [
    ([320], {}, InvalidRequestError, "0 to 319"),
    ([5] * 128, {}, ContextLengthError, "128 tokens"),
    ("", {}, InvalidRequestError, "empty"),
    ([5], {"request_id": 7}, InvalidRequestError, "non-empty string"),
    ([5], {"priority": 1}, InvalidRequestError, "scheduling_policy='priority'"),
    ([5], {"sampling_params": {}}, InvalidRequestError, "must be SamplingParams"),
    ([5], {"sampling_params": SamplingParams(stop_token_ids=[320])}, InvalidRequestError, "not in the vocabulary"),
]


@pytest.mark.parametrize(("prompt", "options", "kind", "says"), BAD_REQUESTS, ids=lambda v: repr(v)[:30])
def test_bad_requests_stay_here(
    prompt: object, options: dict, kind: type[Exception], says: str, engine: RemoteEngine, run: Run
) -> None:
    async def scenario() -> None:
        before = (await engine.snapshot())["num_requests"]
        with pytest.raises(kind, match=says):
            await collect(engine.generate(prompt, **options))  # type: ignore[arg-type]
        assert (await engine.snapshot())["num_requests"] == before

    run(scenario)


def test_a_request_that_is_too_long_for_a_message(
    engine: RemoteEngine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MOST_MESSAGE_BYTES", 2000)

    async def scenario() -> None:
        long = SamplingParams(stop=["x" * 3000], max_tokens=4)
        with pytest.raises(InvalidRequestError, match="too long to be sent.*a message may have 2000"):
            await collect(engine.generate([5], long, request_id="long"))
        outputs = await collect(engine.generate([5], DELTAS.replace(max_tokens=4), request_id="long"))
        assert outputs[-1].finished, "its id is free"

    run(scenario)


def test_an_id_is_in_use_until_its_last_output(engine: RemoteEngine, run: Run) -> None:
    async def scenario() -> None:
        stream = engine.generate([5, 6], DELTAS.replace(max_tokens=100), request_id="same")
        await anext(aiter(stream))
        with pytest.raises(InvalidRequestError, match="'same' is in use") as caught:
            await collect(engine.generate([7], DELTAS, request_id="same"))
        assert caught.value.parameter == "request_id"
        await stream.aclose()  # type: ignore[attr-defined]

    run(scenario)


def test_abort(engine: RemoteEngine, run: Run) -> None:
    async def scenario() -> None:
        before = (await engine.snapshot())["finished"].get("abort", 0)
        stream = aiter(engine.generate([5, 6], DELTAS.replace(max_tokens=120), request_id="mine"))
        outputs = [await anext(stream)]
        engine.abort("mine")
        outputs += [output async for output in stream]
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        engine.abort("nobody")
        assert (await engine.snapshot())["finished"]["abort"] == before + 1

    run(scenario)


def test_a_thousand_aborted_streams(engine: RemoteEngine, run: Run) -> None:
    """Whenever they are left, no block stays behind, and their neighbours are as ever."""
    golden = golden_prompts(TINY / "llama")

    async def one(index: int) -> None:
        task = asyncio.create_task(collect(engine.generate([5 + index % 50] * (1 + index % 60), DELTAS)))
        await asyncio.sleep(0.002 * (index % 11))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def neighbour(index: int) -> None:
        outputs = await collect(engine.generate(golden[index].prompt, DELTAS))
        assert [t for o in outputs for t in o.outputs[0].token_ids] == golden[index].continuation[:24]

    async def scenario() -> None:
        before = (await engine.snapshot())["finished"].get("abort", 0)
        await asyncio.gather(*(one(i) for i in range(1000)), *(neighbour(i) for i in range(5)))
        # A snapshot may come before the step that ends them.
        while (await engine.snapshot())["finished"].get("abort", 0) <= before + 500:
            await asyncio.sleep(0.01)

    run(scenario)


def test_what_a_server_asks(engine: RemoteEngine, run: Run) -> None:
    async def scenario() -> None:
        await engine.check_health()
        before = await engine.snapshot()
        outputs = await collect(engine.generate([5, 6, 7], DELTAS, request_id="asked"))
        after = await engine.snapshot()
        assert after["generation_tokens"] - before["generation_tokens"] == 24
        assert after["num_engine_restarts"] == 0 and after["compiles_after_ready"] == 0
        assert set(after["step_tokens"]) >= {1, 3}, "keys are numbers"
        known = await engine.timeline("asked")
        assert known is not None and known.num_output_tokens == 24 and known.status == "finished"
        assert [e.num_prompt_tokens for e in known.events] == [3] + [0] * 23
        assert await engine.recent_steps(known.events[0].step_id) == list(known.events)
        metrics = outputs[-1].metrics
        assert metrics is not None and metrics.queue_time_s is not None and 0 <= metrics.queue_time_s < 60
        assert all(output.metrics is None for output in outputs[:-1]), "metrics come with the last output"
        assert await engine.timeline("nobody") is None
        assert before["num_steps"] < after["num_steps"]

    run(scenario)


def test_reset_prefix_cache(engine: RemoteEngine, run: Run) -> None:
    prompt = list(range(50, 90))

    async def cached() -> int:
        return (await collect(engine.generate(prompt, DELTAS)))[-1].num_cached_tokens

    async def scenario() -> None:
        await engine.reset_prefix_cache()
        found = [await cached(), await cached()]
        await engine.reset_prefix_cache()
        assert [*found, await cached()] == [0, 32, 0]

    run(scenario)


def test_a_question_that_nobody_can_answer_is_an_error(engine: RemoteEngine, run: Run) -> None:
    async def scenario() -> None:
        with pytest.raises(Exception, match="KeyError: 'weather'"):
            await engine._ask("weather")
        await engine.check_health()

    run(scenario)


def test_signals_of_the_terminal_do_not_reach_the_engine(engine: RemoteEngine, run: Run) -> None:
    assert engine.pid is not None
    assert os.getpgid(engine.pid) != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, number)

    async def scenario() -> None:
        assert (await collect(engine.generate([5], DELTAS)))[-1].finished

    run(scenario)


def test_idle_costs_nothing(engine: RemoteEngine, run: Run) -> None:
    """Neither process wakes up while there is nothing to do."""
    assert engine.pid is not None
    pid = engine.pid

    async def scenario() -> None:
        await collect(engine.generate([5], DELTAS))
        await asyncio.sleep(0.2)
        theirs, ours = cpu_seconds(pid), time.process_time()
        await asyncio.sleep(1.5)
        assert cpu_seconds(pid) - theirs <= 0.03
        assert time.process_time() - ours <= 0.03

    run(scenario)
