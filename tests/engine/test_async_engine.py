"""`AsyncEngine`: many streams at once, cancellation, aborts, the end of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from engine.client import EngineClient
from engine.core import EngineCore
from engine.errors import EngineDeadError, InvalidRequestError, QueueFullError
from engine.outputs import RequestOutput
from engine.requests.request import Request
from engine.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.conftest import EngineShelf
from tests.engine.helpers import SMALL, TINY, golden_prompts, require_idle, tokens_of

MODEL = str(TINY / "llama")
DELTAS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
TIMEOUT_S = 60  # a test that waits longer hangs


def run[T](scenario: Callable[[], Awaitable[T]]) -> T:
    """One event loop for one scenario; a hang becomes a failure."""

    async def bounded() -> T:
        async with asyncio.timeout(TIMEOUT_S):
            return await scenario()

    return asyncio.run(bounded())


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    """All outputs of a stream."""
    return [output async for output in stream]


async def settle(engine: AsyncEngine) -> None:
    """Wait until no request is live, and prove that none left anything behind."""
    while engine._built.core.scheduler.has_work or engine.metrics()["num_in_flight"]:
        await asyncio.sleep(0.005)
    # In the engine's thread: nobody else may touch the core.
    await asyncio.wrap_future(engine._driver.call(lambda: require_idle(engine._built.core)))


@pytest.fixture(scope="module")
def engine(compilation_cache: str) -> Iterator[AsyncEngine]:
    """One for all tests: each test's event loop is another one."""
    engine = AsyncEngine(MODEL, compilation_cache_dir=compilation_cache, **SMALL)
    yield engine
    engine.shutdown()


def new_engine(cache: str, **settings: object) -> AsyncEngine:
    """One that a test may kill."""
    return AsyncEngine(MODEL, compilation_cache_dir=cache, **{**SMALL, **settings})


@contextlib.asynccontextmanager
async def held(engine: AsyncEngine, num_requests: int) -> AsyncIterator[None]:
    """Hold the engine's thread until as many requests wait in its inbox: what comes first is not left to chance."""
    gate = threading.Event()
    engine._driver.call(gate.wait)
    try:
        yield
        while engine._driver._inbox.qsize() < num_requests:
            await asyncio.sleep(0.001)
    finally:
        gate.set()


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take so long that no request ends before a test has done something to it."""
    step = EngineCore.step

    def slow(core: EngineCore) -> list[RequestOutput]:
        time.sleep(0.01)
        return step(core)

    monkeypatch.setattr(EngineCore, "step", slow)


def test_many_streams_equal_the_engine(engine: AsyncEngine, shelf: EngineShelf) -> None:
    """Forty requests that start at different times, of all output kinds."""
    golden = golden_prompts(TINY / "llama")
    fields = [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 4, "n": 2},
        {"seed": 5, "presence_penalty": 1.0, "logprobs": 1},
    ]
    plain = SamplingParams(max_tokens=12, ignore_eos=True)
    jobs = [(golden[i % 5].prompt[: 5 + i], plain.replace(**fields[i % 4])) for i in range(40)]
    expected = shelf.take().generate([p for p, _ in jobs], [q for _, q in jobs])

    async def one(index: int) -> list[RequestOutput]:
        prompt, params = jobs[index]
        await asyncio.sleep(0.002 * (index % 7))
        return await collect(engine.generate(prompt, params.replace(output_kind=list(RequestOutputKind)[index % 3])))

    async def scenario() -> list[list[RequestOutput]]:
        results = await asyncio.gather(*(one(i) for i in range(len(jobs))))
        await settle(engine)
        return results

    for index, (outputs, alone) in enumerate(zip(run(scenario), expected, strict=True)):
        kind = list(RequestOutputKind)[index % 3]
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert (len(outputs) == 1) == (kind is RequestOutputKind.FINAL_ONLY)
        if kind is RequestOutputKind.DELTA:
            for i, completion in enumerate(alone.outputs):
                assert "".join(o.outputs[i].text for o in outputs) == completion.text
                assert tuple(t for o in outputs for t in o.outputs[i].token_ids) == completion.token_ids
        else:
            assert tokens_of(outputs[-1]) == tokens_of(alone)
            assert [c.text for c in outputs[-1].outputs] == [c.text for c in alone.outputs]


def test_deltas_by_default(engine: AsyncEngine) -> None:
    async def scenario() -> list[RequestOutput]:
        return await collect(engine.generate("hello"))

    outputs = run(scenario)
    assert len(outputs) > 1 and sum(len(o.outputs[0].token_ids) for o in outputs) <= 16


def test_a_slow_consumer_gets_merged_deltas(engine: AsyncEngine, shelf: EngineShelf) -> None:
    """It sees few outputs, and everything in them; whoever asks for cumulative ones sees the same."""
    params = DELTAS.replace(max_tokens=60, logprobs=1)
    alone = shelf.take().generate([5, 6], params)[0].outputs[0]

    async def consume(kind: RequestOutputKind) -> list[RequestOutput]:
        outputs = []
        async for output in engine.generate([5, 6], params.replace(output_kind=kind)):
            outputs.append(output)
            while engine._built.core.scheduler.has_work:
                await asyncio.sleep(0.005)
        return outputs

    async def scenario() -> list[list[RequestOutput]]:
        return [await consume(RequestOutputKind.DELTA), await consume(RequestOutputKind.CUMULATIVE)]

    deltas, cumulative = run(scenario)
    assert len(deltas) <= 3 and len(cumulative) <= 3
    assert tuple(t for o in deltas for t in o.outputs[0].token_ids) == alone.token_ids
    assert "".join(o.outputs[0].text for o in deltas) == alone.text
    assert len([p for o in deltas for p in o.outputs[0].logprobs or []]) == 60
    last = cumulative[-1].outputs[0]
    assert (last.text, last.token_ids, len(last.logprobs or [])) == (alone.text, alone.token_ids, 60)
    assert cumulative[-1].outputs[0].cumulative_logprob == pytest.approx(alone.cumulative_logprob)


def test_what_a_server_asks(engine: AsyncEngine) -> None:
    client: EngineClient = engine  # type: ignore[assignment]  # all of it but `embed`

    async def scenario() -> None:
        await client.check_health()
        before = await client.snapshot()
        outputs = await collect(client.generate([5, 6, 7], DELTAS, request_id="asked"))
        after = await client.snapshot()
        assert after["generation_tokens"] - before["generation_tokens"] == 24
        assert after["prompt_tokens"] - before["prompt_tokens"] == 3
        known = await client.timeline("asked")
        assert known is not None and known.num_output_tokens == 24 and len(known.events) == 24
        steps = await client.recent_steps(known.events[0].step_id)
        assert steps[: len(known.events)] == list(known.events)
        padded = after["num_padded_tokens"] - before["num_padded_tokens"]
        assert padded >= after["num_tokens"] - before["num_tokens"] == 26
        grown = {k: n - before["step_tokens"].get(k, 0) for k, n in after["step_tokens"].items()}
        assert {k: n for k, n in grown.items() if n} == {1: 23, 3: 1}
        assert after["cache_config"]["num_gpu_blocks"] == client.info.num_kv_blocks == 255
        metrics = outputs[-1].metrics
        assert metrics is not None and metrics.queue_time_s is not None and metrics.decode_time_s is not None
        assert metrics.inference_time_s == pytest.approx((metrics.prefill_time_s or 0) + metrics.decode_time_s)
        assert await client.timeline("nobody") is None
        await settle(engine)

    run(scenario)


def test_a_thousand_aborted_streams(engine: AsyncEngine) -> None:
    """Whenever they are left, no block stays behind."""

    async def one(index: int) -> None:
        stream = engine.generate([5 + index % 50] * (1 + index % 60), DELTAS)
        task = asyncio.create_task(collect(stream))
        await asyncio.sleep(0.002 * (index % 11))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def scenario() -> None:
        await asyncio.gather(*(one(i) for i in range(1000)))
        await settle(engine)
        await asyncio.sleep(0)
        assert not engine._streams

    run(scenario)


@pytest.mark.usefixtures("slow_steps")
def test_leaving_early_aborts(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        before = engine.metrics()["finished"].get("abort", 0)
        stream = engine.generate([5, 6], DELTAS.replace(max_tokens=100))
        async for output in stream:
            assert not output.finished
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await settle(engine)
        assert engine.metrics()["finished"]["abort"] == before + 1

    run(scenario)


@pytest.mark.usefixtures("slow_steps")
def test_cancellation_aborts_and_spares_the_others(engine: AsyncEngine) -> None:
    golden = golden_prompts(TINY / "llama")

    async def scenario() -> None:
        before = engine.metrics()["finished"].get("abort", 0)
        tasks = [asyncio.create_task(collect(engine.generate(g.prompt, DELTAS))) for g in golden for _ in range(2)]
        await asyncio.sleep(0.01)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        for g, outputs in zip(golden, results[1::2], strict=True):
            assert isinstance(outputs, list)
            assert [t for o in outputs for t in o.outputs[0].token_ids] == g.continuation[:24]
        await settle(engine)
        assert engine.metrics()["finished"]["abort"] == before + 5

    run(scenario)


def test_cancellation_before_the_first_output(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        for delay in (0, 0, 0.001):
            task = asyncio.create_task(collect(engine.generate([5] * 100, DELTAS)))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await settle(engine)

    run(scenario)


@pytest.mark.usefixtures("slow_steps")
def test_abort_by_id(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        tokens = 0
        async for output in engine.generate([5, 6], DELTAS.replace(max_tokens=100), request_id="mine"):
            assert output.request_id == "mine"
            tokens += len(output.outputs[0].token_ids)
            if tokens == 3:
                engine.abort("mine")
        assert output.finished and output.outputs[0].finish_reason == "abort" and output.error is None
        assert 3 <= tokens < 100
        engine.abort("nobody")
        await settle(engine)

    run(scenario)


def test_an_id_is_free_again_once_its_request_has_ended(engine: AsyncEngine) -> None:
    """Never do outputs of one request reach another one of the same id."""

    async def scenario() -> None:
        stream = engine.generate([5, 6], DELTAS.replace(max_tokens=100), request_id="same")
        await anext(aiter(stream))
        with pytest.raises(InvalidRequestError, match="'same' is in use") as caught:
            await collect(engine.generate([7], DELTAS, request_id="same"))
        assert caught.value.parameter == "request_id"
        await stream.aclose()  # type: ignore[attr-defined]
        for attempt in itertools.count():
            try:
                outputs = await collect(engine.generate([7], DELTAS, request_id="same"))
                break
            except InvalidRequestError:  # the old one has been told to end, but has not ended yet
                assert attempt < 1000
                await asyncio.sleep(0.002)
        assert {tuple(o.prompt_token_ids) for o in outputs} == {(7,)}
        assert sum(len(o.outputs[0].token_ids) for o in outputs) == 24
        await settle(engine)
        assert not engine._streams

    run(scenario)


def test_one_loop_after_another(engine: AsyncEngine) -> None:
    """Streams that a closed loop left open are aborted, and their ids are free."""

    async def left_open() -> None:
        stream = engine.generate([5, 6], DELTAS.replace(max_tokens=120), request_id="left")
        await anext(aiter(stream))

    async def scenario() -> list[RequestOutput]:
        await settle(engine)
        return await collect(engine.generate([5, 6], DELTAS, request_id="left"))

    run(left_open)
    assert len(run(scenario)[-1].outputs[0].token_ids) >= 1


def test_two_loops_at_once_are_refused(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        stream = engine.generate([5], DELTAS)
        await anext(aiter(stream))

        async def other() -> None:
            await collect(engine.generate([6], DELTAS))

        with pytest.raises(RuntimeError, match="one event loop"):
            await asyncio.to_thread(asyncio.run, other())
        assert (await collect(stream))[-1].finished
        await settle(engine)

    run(scenario)


def test_reset_prefix_cache(engine: AsyncEngine) -> None:
    prompt = list(range(50, 90))

    async def cached() -> int:
        return (await collect(engine.generate(prompt, DELTAS)))[-1].num_cached_tokens

    async def scenario() -> list[int]:
        await engine.reset_prefix_cache()
        found = [await cached(), await cached()]
        await engine.reset_prefix_cache()
        found.append(await cached())
        await settle(engine)
        return found

    assert run(scenario) == [0, 32, 0]


def test_a_full_queue(compilation_cache: str) -> None:
    async def scenario() -> None:
        async with new_engine(compilation_cache, max_num_queued_reqs=2) as engine:
            async with held(engine, 30):
                tasks = [asyncio.create_task(collect(engine.generate([5 + i], DELTAS))) for i in range(30)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [r for r in results if isinstance(r, QueueFullError)]
            served = [r for r in results if isinstance(r, list)]
            assert (len(refused), len(served)) == (28, 2)
            assert all("max_num_queued_reqs=2" in str(r) for r in refused)
            assert all(sum(len(o.outputs[0].token_ids) for o in outputs) == 24 for outputs in served)
            await settle(engine)

    run(scenario)


def test_priorities(compilation_cache: str) -> None:
    async def scenario() -> None:
        async with new_engine(compilation_cache, scheduling_policy="priority") as engine:
            urgent = {i: i % 4 for i in range(20)}
            async with held(engine, 20):
                streams = [engine.generate([5 + i], DELTAS, priority=p) for i, p in urgent.items()]
                tasks = [asyncio.create_task(collect(stream)) for stream in streams]
            outputs = await asyncio.gather(*tasks)
            started = {i: o[-1].metrics.scheduled_ts or 0.0 for i, o in enumerate(outputs) if o[-1].metrics}
            # Those that start in one step have one time.
            order = [urgent[i] for i in sorted(started, key=lambda i: (started[i], urgent[i]))]
            assert order == sorted(urgent.values())

    run(scenario)


class TestTheEnd:
    """Streams never hang: they end with an output or an exception."""

    @pytest.mark.usefixtures("slow_steps")
    def test_shutdown_ends_live_streams(self, compilation_cache: str) -> None:
        engine = new_engine(compilation_cache)

        async def scenario() -> None:
            tasks = [
                asyncio.create_task(collect(engine.generate([5 + i], DELTAS.replace(max_tokens=120)))) for i in range(9)
            ]
            await asyncio.sleep(0.01)
            await asyncio.to_thread(engine.shutdown)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(r) for r in results] == [EngineDeadError] * 9
            assert all("shut down" in str(r) for r in results)
            with pytest.raises(EngineDeadError, match="shut down"):
                await collect(engine.generate([5], DELTAS))

        run(scenario)
        engine.shutdown()  # twice does no harm

    def test_leaving_the_block_shuts_down(self, compilation_cache: str) -> None:
        async def scenario() -> None:
            async with new_engine(compilation_cache) as engine:
                assert (await collect(engine.generate([5], DELTAS)))[-1].finished
            assert not engine._thread.is_alive()

        run(scenario)

    def test_a_loop_that_fails_ends_everything(self, compilation_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not a step, but the engine itself: each stream learns of it, and whoever comes later."""
        engine = new_engine(compilation_cache)
        calls = itertools.count()
        step = EngineCore.step

        def fail_late(core: EngineCore) -> list[RequestOutput]:
            if next(calls) == 5:
                raise RuntimeError("a bug of the engine")
            return step(core)

        monkeypatch.setattr(EngineCore, "step", fail_late)

        async def scenario() -> None:
            tasks = [asyncio.create_task(collect(engine.generate([5 + i], DELTAS))) for i in range(8)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(r) for r in results] == [EngineDeadError] * 8
            assert all("a bug of the engine" in str(r) for r in results)
            assert len({id(r) for r in results}) == 8, "an exception carries the traceback of the one who got it"
            with pytest.raises(EngineDeadError, match="a bug of the engine"):
                await collect(engine.generate([5], DELTAS))
            engine.abort("req-0")

        run(scenario)

    def test_death_between_the_check_and_the_inbox(
        self, compilation_cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The moment at which nobody is left to read the inbox, and nobody has told the stream."""
        engine = new_engine(compilation_cache)
        make = engine._built.inputs.make

        def make_and_die(*args: Any, **options: Any) -> Request:
            engine.shutdown()
            return make(*args, **options)

        monkeypatch.setattr(engine._built.inputs, "make", make_and_die)

        async def scenario() -> None:
            with pytest.raises(EngineDeadError, match="shut down"):
                await collect(engine.generate([5], DELTAS))

        run(scenario)

    def test_death_while_a_request_comes_in(self, compilation_cache: str) -> None:
        """Requests that race with a shutdown are refused or ended, whatever the moment."""
        engine = new_engine(compilation_cache)

        async def scenario() -> None:
            async def flood() -> list[object]:
                results: list[object] = []
                for _ in range(200):
                    results += await asyncio.gather(collect(engine.generate([5], DELTAS)), return_exceptions=True)
                    if isinstance(results[-1], EngineDeadError):
                        return results
                return results

            floods = [asyncio.create_task(flood()) for _ in range(4)]
            await asyncio.sleep(0.05)
            await asyncio.to_thread(engine.shutdown)
            for results in await asyncio.gather(*floods):
                assert isinstance(results[-1], EngineDeadError)
                assert all(isinstance(r, list) for r in results[:-1])

        run(scenario)
