"""A step that raises ends the requests that are in it, and no others; the engine goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import pytest

from engine.async_engine import AsyncEngine
from engine.core import MOST_FAILURES_IN_A_ROW, CoreOptions, EngineCore
from engine.engine import Engine
from engine.errors import EngineDeadError, RequestFailedError
from engine.outputs import RequestOutput
from engine.requests.request import Request
from engine.runtime.executor import Executor, InFlightStep, StepResult
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.scheduling.plan import StepPlan
from tests.engine.conftest import MakeEngine
from tests.engine.helpers import (
    SMALL,
    TINY,
    core_of,
    drive,
    golden_prompts,
    inputs_of,
    pool_of,
    require_idle,
    tokens_of,
)

LENGTH = 16
NUM_REQUESTS = 9  # four run at a time: while some fail others wait


class BrokenExecutor:
    """An executor that fails at chosen steps.

    Args:
        real: does the work.
        dispatch_at, collect_at: numbers of the calls that raise, counted from 0.
        after: what to do to the real executor before the error is raised: a step may have lost its state.
    """

    def __init__(
        self,
        real: Executor,
        *,
        dispatch_at: tuple[int, ...] = (),
        collect_at: tuple[int, ...] = (),
        after: Callable[[Executor], None] = lambda executor: None,
    ) -> None:
        self._real, self.executables = real, real.executables
        self._dispatch_at, self._collect_at, self._after = dispatch_at, collect_at, after
        self._num_dispatched = self._num_collected = 0
        self.in_failed: set[str] = set()

    def _fail(self, plan: StepPlan) -> None:
        self.in_failed |= {item.sequence.request.request_id for item in plan.items if not item.sequence.finished}
        self._after(self._real)
        raise RuntimeError("injected")

    def dispatch(self, plan: StepPlan) -> InFlightStep:
        """Start a step, unless it is to fail: then after half of it is done."""
        number, self._num_dispatched = self._num_dispatched, self._num_dispatched + 1
        step = self._real.dispatch(plan)
        if number in self._dispatch_at:
            self._fail(plan)
        return step

    def collect(self, step: InFlightStep) -> StepResult:
        """Read a step, unless it is to fail."""
        number, self._num_collected = self._num_collected, self._num_collected + 1
        if number in self._collect_at:
            self._fail(step.plan)
        return self._real.collect(step)

    def reset_state(self) -> None:
        """As the real one."""
        self._real.reset_state()


def lose_state(executor: Executor) -> None:
    """What a step that raised after its arrays were donated leaves behind."""
    for array in jax.tree.leaves(executor._forward_state):
        array.delete()
    executor._sample_state.rows.last_token.delete()


@pytest.fixture
def core(engine: Engine) -> Iterator[EngineCore]:
    """The core of the shared engine, idle before and after."""
    core = core_of(engine)
    real, options = core.executor, core._options
    yield core
    core.executor, core._options = real, options
    require_idle(core)


def requests_of(engine: Engine) -> list[Request]:
    """Greedy and sampled requests, with penalties: their device state must be made anew as well."""
    golden, requests = golden_prompts(TINY / "llama"), []
    for i in range(NUM_REQUESTS):
        params = SamplingParams(max_tokens=LENGTH, seed=i, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
        fields = [{"temperature": 0.0}, {"frequency_penalty": 0.8}, {"top_k": 40, "logprobs": 2}][i % 3]
        requests.append(inputs_of(engine).make(golden[i % 5].prompt, params.replace(**fields), request_id=f"r{i}"))
    return requests


@pytest.fixture
def expected(engine: Engine) -> dict[str, RequestOutput]:
    """What the requests give when nothing fails."""
    return drive(core_of(engine), [(0, request) for request in requests_of(engine)])


FAULTS = {
    "the first dispatch": {"dispatch_at": (0,)},
    "a dispatch while a step is in flight": {"dispatch_at": (7,)},
    "a dispatch that lost the state": {"dispatch_at": (7,), "after": lose_state},
    "the first collect": {"collect_at": (0,)},
    "a collect while a step is in flight": {"collect_at": (9,)},
    "a collect that lost the state": {"collect_at": (9,), "after": lose_state},
    "a dispatch, and then the collect before it": {"dispatch_at": (7,), "collect_at": (6,)},
    "several steps": {"dispatch_at": (2,), "collect_at": (12,)},
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_only_the_requests_of_the_step_fail(
    fault: dict, overlap: bool, engine: Engine, core: EngineCore, expected: dict[str, RequestOutput]
) -> None:
    broken = BrokenExecutor(core.executor, **fault)
    core._options = CoreOptions(overlap=overlap)
    core.executor = broken  # type: ignore[assignment]
    failed_before = core.stats.num_failed_steps
    outputs = drive(core, [(step, request) for step, request in enumerate(requests_of(engine))])
    ended = {name for name, output in outputs.items() if output.error is not None}
    assert ended == broken.in_failed and 0 < len(ended) < NUM_REQUESTS
    assert core.stats.num_failed_steps - failed_before <= len(
        [*fault.get("dispatch_at", ()), *fault.get("collect_at", ())]
    )
    for name, output in outputs.items():
        if name in ended:
            assert output.outputs[0].finish_reason == "error" and "RuntimeError: injected" in str(output.error)
            # What it had is what it would have had.
            known = expected[name].outputs[0].token_ids
            assert output.outputs[0].token_ids == known[: len(output.outputs[0].token_ids)]
        else:
            assert tokens_of(output) == tokens_of(expected[name]) and output.outputs[0].finish_reason == "length"
    require_idle(core)
    # The engine goes on as if nothing had been, prefix cache included.
    core.executor = broken._real
    again = drive(core, [(0, replace(request, request_id=f"x{request.request_id}")) for request in requests_of(engine)])
    assert {name[1:]: tokens_of(output) for name, output in again.items()} == {
        name: tokens_of(output) for name, output in expected.items()
    }


def test_the_failed_plan_is_logged(engine: Engine, core: EngineCore, caplog: pytest.LogCaptureFixture) -> None:
    core.executor = BrokenExecutor(core.executor, collect_at=(0,))  # type: ignore[assignment]
    request = inputs_of(engine).make([5, 6, 7], SamplingParams(max_tokens=4), request_id="the-one")
    with caplog.at_level(logging.ERROR, "quire.core"):
        core.add(request)
        while core.has_work:
            core.step()
    assert "the-one[0]: 0 + 3" in caplog.text and "injected" in caplog.text


def test_one_of_n_completions_fails(make_engine: MakeEngine) -> None:
    """The request fails as a whole, and holds nothing afterwards."""
    engine = make_engine()
    core = core_of(engine)
    real = core.executor
    core.executor = BrokenExecutor(real, dispatch_at=(3,))  # type: ignore[assignment]
    params = SamplingParams(n=8, seed=0, max_tokens=6, ignore_eos=True)  # four run, the others wait
    try:
        output = engine.generate([5] * 20, params)[0]
    finally:
        core.executor = real
    reasons = [c.finish_reason for c in output.outputs]
    assert output.error is not None and output.finished and "error" in reasons
    assert pool_of(core).num_free == pool_of(core).num_usable


@pytest.mark.parametrize("kind", ["dispatch_at", "collect_at"])
def test_nothing_but_failures_ends_the_engine(kind: str, engine: Engine, core: EngineCore) -> None:
    """The fifth failure in a row is the last; a success between them starts the count anew."""
    most = MOST_FAILURES_IN_A_ROW
    real = core.executor
    one = SamplingParams(temperature=0, max_tokens=1)

    def serve(request_id: str) -> str | None:
        core.add(inputs_of(engine).make([5, 6], one, request_id=request_id))
        reason = None
        while core.has_work:
            for output in core.step():
                reason = output.outputs[0].finish_reason
        return reason

    core.executor = BrokenExecutor(real, **{kind: tuple(range(most - 1))})  # type: ignore[assignment]
    assert [serve(f"a{i}") for i in range(most)] == ["error"] * (most - 1) + ["length"]
    core.executor = BrokenExecutor(real, **{kind: tuple(range(most))})  # type: ignore[assignment]
    assert [serve(f"b{i}") for i in range(most - 1)] == ["error"] * (most - 1)
    with pytest.raises(EngineDeadError, match=f"{most} steps .* RuntimeError: injected"):
        serve("last")
    core.executor = real
    while core.has_work:
        core.step()
    assert serve("again") == "length"


def test_an_async_engine_dies_of_nothing_but_failures(compilation_cache: str) -> None:
    async def consume(engine: AsyncEngine) -> list[RequestOutput]:
        return [output async for output in engine.generate([5, 6], SamplingParams(max_tokens=2))]

    async def scenario() -> None:
        async with AsyncEngine(str(TINY / "llama"), compilation_cache_dir=compilation_cache, **SMALL) as engine:
            core = engine._built.core
            core.executor = BrokenExecutor(core.executor, dispatch_at=tuple(range(99)))  # type: ignore[assignment]
            for _ in range(MOST_FAILURES_IN_A_ROW - 1):
                with pytest.raises(RequestFailedError, match="injected"):
                    await consume(engine)
            await engine.check_health()
            with pytest.raises(EngineDeadError, match="one after another"):
                await consume(engine)
            for call in (engine.check_health, engine.snapshot, engine.reset_prefix_cache, lambda: consume(engine)):
                with pytest.raises(EngineDeadError, match="one after another"):
                    await call()

    asyncio.run(scenario())


def test_streams_raise(engine: Engine, core: EngineCore) -> None:
    core.executor = BrokenExecutor(core.executor, collect_at=(3,))  # type: ignore[assignment]
    texts = []
    with pytest.raises(RequestFailedError, match="injected"):
        for output in engine.stream([5, 6], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)):
            texts.append(output.outputs[0].text)
    assert len(texts) == 3


def test_in_an_async_engine(compilation_cache: str) -> None:
    """Three streams share the failing step, a fourth arrives afterwards."""
    golden = golden_prompts(TINY / "llama")[1]
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)

    async def consume(engine: AsyncEngine) -> list[int]:
        outputs = [output async for output in engine.generate(golden.prompt, params)]
        return list(outputs[-1].outputs[0].token_ids)

    async def scenario() -> None:
        async with AsyncEngine(str(TINY / "llama"), compilation_cache_dir=compilation_cache, **SMALL) as engine:
            core = engine._built.core
            core.executor = BrokenExecutor(core.executor, collect_at=(6,))  # type: ignore[assignment]
            results = await asyncio.gather(*(consume(engine) for _ in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [RequestFailedError] * 3
            assert all("injected" in str(result) for result in results)
            assert await consume(engine) == golden.continuation[:LENGTH]
            metrics = engine.metrics()
            assert metrics["num_failed_steps"] == 1 and metrics["finished"] == {"error": 3, "length": 1}
            assert metrics["num_running"] == 0 and metrics["kv_cache_usage"] == 0.0

    asyncio.run(scenario())
