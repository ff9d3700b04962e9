"""The beginning and the end of the engine's process, and what its users see of both."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import (
    ConfigError,
    EngineDeadError,
    EngineRestartingError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestFailedError,
)
from engine.remote import process, supervisor
from engine.remote.client import RemoteEngine
from tests.engine.helpers import TINY, golden_prompts
from tests.engine.remote.support import (
    DELTAS,
    MODEL,
    SMALLEST,
    WORKERS,
    collect,
    is_alive,
    run,
    start,
    until_healthy,
    wait_for_end,
)

ROOT = Path(__file__).resolve().parents[3]
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Start another worker than the real one."""
    return lambda name: monkeypatch.setattr(process, "WORKER_MODULE", f"{WORKERS}.{name}")


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that a test starts, in order."""
    found: list[int] = []
    popen = subprocess.Popen

    def note(*args: object, **options: object) -> subprocess.Popen:
        started = popen(*args, **options)  # type: ignore[call-overload]
        found.append(started.pid)
        return started

    monkeypatch.setattr(process.subprocess, "Popen", note)
    return found


class TestTheBeginning:
    def test_errors_are_those_of_an_engine(self, pids: list[int]) -> None:
        async def scenario() -> None:
            with pytest.raises(ConfigError, match="Unknown setting max_num_sequences"):
                await RemoteEngine.start(MODEL, max_num_sequences=4)
            assert not pids, "nothing was started"
            with pytest.raises(ModelNotFoundError, match="nowhere/at/all") as caught:
                await RemoteEngine.start("nowhere/at/all/there", show_progress=False)
            assert "\n" not in str(caught.value)
            assert not is_alive(pids[0])

        run(scenario)

    def test_a_crash_at_the_start(self, use: Use, pids: list[int], compilation_cache: str) -> None:
        use("crashes_at_start")

        async def scenario() -> None:
            with pytest.raises(EngineDeadError, match=r"ended while it started \(exit status 3\)"):
                await start(compilation_cache)
            assert not is_alive(pids[0])

        run(scenario)

    @pytest.mark.slow
    def test_a_bug_at_the_start(self, use: Use, compilation_cache: str, capfd: pytest.CaptureFixture[str]) -> None:
        """The traceback goes to our standard error, the cause comes as one sentence."""
        use("bug_at_start")

        async def scenario() -> None:
            with pytest.raises(EngineDeadError) as caught:
                await start(compilation_cache)
            assert str(caught.value) == "the engine could not be built: ZeroDivisionError: no device"

        run(scenario)
        out, err = capfd.readouterr()
        assert "Traceback" in err and "no device" in err and not out

    def test_cancelled_while_it_starts(self, use: Use, pids: list[int], compilation_cache: str) -> None:
        use("never_ready")

        async def scenario() -> None:
            task = asyncio.create_task(start(compilation_cache))
            await asyncio.sleep(0.5)
            assert len(pids) == 1 and is_alive(pids[0])
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not is_alive(pids[0])

        run(scenario)

    @pytest.mark.slow
    def test_progress_and_logs_come_to_our_stderr(
        self, compilation_cache: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        logger = logging.getLogger("quire")
        level = logger.level
        logger.setLevel(logging.INFO)

        async def scenario() -> None:
            await (await start(compilation_cache, show_progress=True)).close()

        try:
            run(scenario)
        finally:
            logger.setLevel(level)
        out, err = capfd.readouterr()
        assert "compiling" in err and "INFO quire [engine]: memory:" in err and not out


class TestTheEnd:
    @pytest.mark.slow
    def test_close_ends_streams_and_the_process(self, use: Use, compilation_cache: str) -> None:
        use("slow_steps")

        async def scenario() -> None:
            engine = await start(compilation_cache)
            pid = engine.pid
            assert pid is not None
            tasks = [asyncio.create_task(collect(engine.generate([5 + i], DELTAS))) for i in range(5)]
            asking = asyncio.create_task(engine.snapshot())
            await asyncio.sleep(0.1)
            await asking
            started = time.monotonic()
            await engine.close()
            assert time.monotonic() - started < supervisor.CLOSE_TIMEOUT_S, "it went by itself"
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(r) for r in results] == [EngineDeadError] * 5
            assert all("shut down" in str(r) for r in results)
            assert not is_alive(pid) and engine.pid is None
            for call in (engine.check_health, engine.snapshot, lambda: collect(engine.generate([5], DELTAS))):
                with pytest.raises(EngineDeadError, match="shut down"):
                    await call()
            engine.abort("nobody")
            await engine.close()  # twice does no harm

        run(scenario)

    @pytest.mark.slow
    def test_a_process_that_does_not_stop_is_killed(
        self, use: Use, compilation_cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use("never_stops")
        monkeypatch.setattr(supervisor, "CLOSE_TIMEOUT_S", 0.5)

        async def scenario() -> None:
            engine = await start(compilation_cache)
            pid = engine.pid
            assert pid is not None
            await engine.close()
            assert not is_alive(pid)

        run(scenario)

    @pytest.mark.slow
    def test_it_ends_with_its_parent(self, compilation_cache: str) -> None:
        """Killed while serving: the parent has no time to say anything."""
        script = (
            "import asyncio\n"
            "from engine.remote.client import RemoteEngine\n"
            "async def main():\n"
            f"    engine = await RemoteEngine.start({MODEL!r}, compilation_cache_dir={compilation_cache!r},"
            f" **{dict(SMALLEST)!r})\n"
            "    print(engine.pid, flush=True)\n"
            "    await asyncio.sleep(600)\n"
            "asyncio.run(main())\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert parent.stdout is not None
        try:
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
        finally:
            parent.kill()
            parent.wait()
            parent.stdout.close()
        wait_for_end(pid)

    def test_it_ends_with_its_parent_while_it_starts(self) -> None:
        script = (
            "import asyncio\n"
            "from engine.remote import process\n"
            "from engine.remote.wire import Start\n"
            f"process.WORKER_MODULE = '{WORKERS}.never_ready'\n"
            "async def main():\n"
            "    worker = await process.WorkerProcess.start(print, print)\n"
            "    worker.send(Start({}, 20))\n"
            "    print(worker.pid, flush=True)\n"
            "    await asyncio.sleep(600)\n"
            "asyncio.run(main())\n"
        )
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert parent.stdout is not None
        try:
            pid = int(parent.stdout.readline())
            assert is_alive(pid)
        finally:
            parent.kill()
            parent.wait()
            parent.stdout.close()
        wait_for_end(pid)


@pytest.mark.slow
class TestDeath:
    def test_killed_once_it_comes_back_killed_twice_it_does_not(
        self, use: Use, compilation_cache: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        use("slow_steps")
        golden = golden_prompts(TINY / "llama")[0]

        async def kill(engine: RemoteEngine) -> list[BaseException]:
            """Kill the process under four streams and a question; what they get."""
            pid = engine.pid
            assert pid is not None
            tasks = [asyncio.create_task(collect(engine.generate([5 + i], DELTAS))) for i in range(4)]
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert not is_alive(pid)
            return [r for r in results if isinstance(r, BaseException)]

        async def scenario() -> None:
            async with await start(compilation_cache) as engine:
                first = await kill(engine)
                assert [type(e) for e in first] == [EngineDeadError] * 4
                assert all("ended unexpectedly (signal 9); restarting" in str(e) for e in first)
                assert len({id(e) for e in first}) == 4
                for call in (engine.check_health, engine.snapshot, lambda: collect(engine.generate([5], DELTAS))):
                    with pytest.raises(EngineRestartingError, match="restarting"):
                        await call()
                await until_healthy(engine)
                await engine.check_health()
                outputs = await collect(engine.generate(golden.prompt, DELTAS))
                assert [t for o in outputs for t in o.outputs[0].token_ids] == golden.continuation[:24]
                assert (await engine.snapshot())["num_engine_restarts"] == 1
                second = await kill(engine)
                assert all("is not restarted again" in str(e) for e in second) and len(second) == 4
                await asyncio.sleep(0.1)
                for call in (engine.check_health, lambda: collect(engine.generate([5], DELTAS))):
                    with pytest.raises(EngineDeadError, match="not restarted again") as caught:
                        await call()
                    assert not isinstance(caught.value, EngineRestartingError)

        with caplog.at_level(logging.ERROR, "quire.remote"):
            run(scenario)
        assert "signal 9" in caplog.text

    def test_whoever_lived_long_is_restarted_again(
        self, compilation_cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "RESTART_INTERVAL_S", 0.0)

        async def scenario() -> None:
            async with await start(compilation_cache) as engine:
                for _ in range(2):
                    assert engine.pid is not None
                    os.kill(engine.pid, signal.SIGKILL)
                    wait_for_end_of = engine.pid
                    while is_alive(wait_for_end_of) or engine.pid == wait_for_end_of:
                        await asyncio.sleep(0.02)
                    await until_healthy(engine)
                    assert (await collect(engine.generate([5], DELTAS)))[-1].finished
                assert (await engine.snapshot())["num_engine_restarts"] == 2

        run(scenario)

    def test_a_restart_that_fails(self, use: Use, compilation_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
        async def scenario() -> None:
            async with await start(compilation_cache) as engine:
                use("bug_at_start")
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)
                while True:
                    try:
                        await engine.check_health()
                    except EngineRestartingError:
                        pass
                    except EngineDeadError as error:
                        assert "could not be started again" in str(error) and "no device" in str(error)
                        break
                    await asyncio.sleep(0.02)

        run(scenario)

    def test_closed_while_it_restarts(self, use: Use, pids: list[int], compilation_cache: str) -> None:
        async def scenario() -> None:
            engine = await start(compilation_cache)
            use("never_ready")
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            while len(pids) < 2:
                await asyncio.sleep(0.02)
            await engine.close()
            assert not any(is_alive(pid) for pid in pids)
            with pytest.raises(EngineDeadError, match="shut down"):
                await engine.check_health()

        run(scenario)


@pytest.mark.slow
class TestFailures:
    def test_a_step_that_fails(self, use: Use, compilation_cache: str) -> None:
        """Two streams share the failing step, a third comes afterwards."""
        use("one_failure")
        golden = golden_prompts(TINY / "llama")[1]

        async def scenario() -> None:
            async with await start(compilation_cache) as engine:
                tasks = [collect(engine.generate([5, 6], DELTAS)) for _ in range(2)]
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(r, RequestFailedError) and "injected" in str(r) for r in results)
                outputs = await collect(engine.generate(golden.prompt, DELTAS))
                assert [t for o in outputs for t in o.outputs[0].token_ids] == golden.continuation[:24]
                state = await engine.snapshot()
                assert state["num_failed_steps"] == 1 and state["finished"] == {"error": 2, "length": 1}
                assert state["kv_cache_usage"] == 0.0

        run(scenario)

    def test_nothing_but_failures_is_a_death(self, use: Use, compilation_cache: str) -> None:
        use("only_failures")

        async def scenario() -> None:
            async with await start(compilation_cache) as engine:
                for _ in range(4):
                    with pytest.raises(RequestFailedError, match="injected"):
                        await collect(engine.generate([5, 6], DELTAS))
                with pytest.raises(EngineDeadError, match=r"5 steps .* one after another.*injected; restarting"):
                    await collect(engine.generate([5, 6], DELTAS))
                await until_healthy(engine)
                await engine.check_health()

        run(scenario)

    def test_an_output_that_is_too_long(self, use: Use, compilation_cache: str) -> None:
        """Its request fails, and no other; its id and its blocks are free again."""
        use("short_messages")

        async def scenario() -> None:
            async with await start(compilation_cache) as engine:
                prompt = list(range(10, 60))
                neighbour = asyncio.create_task(collect(engine.generate([5, 6], DELTAS)))
                with pytest.raises(RequestFailedError, match="too long to leave .* a message may have 3000"):
                    await collect(engine.generate(prompt, DELTAS.replace(prompt_logprobs=20), request_id="long"))
                assert (await neighbour)[-1].finished
                await asyncio.sleep(0.1)
                assert (await collect(engine.generate(prompt, DELTAS, request_id="long")))[-1].finished
                state = await engine.snapshot()
                assert state["num_running"] == state["num_waiting"] == 0 and state["kv_cache_usage"] == 0.0

        run(scenario)

    def test_a_full_queue(self, use: Use, compilation_cache: str) -> None:
        use("slow_steps")

        async def scenario() -> None:
            async with await start(compilation_cache, max_num_queued_reqs=2) as engine:
                tasks = [collect(engine.generate([5 + i], DELTAS)) for i in range(30)]
                results = await asyncio.gather(*tasks, return_exceptions=True)
                refused = [r for r in results if isinstance(r, QueueFullError)]
                served = [r for r in results if isinstance(r, list)]
                assert len(refused) + len(served) == 30 and 2 <= len(served) <= 10
                assert all("max_num_queued_reqs=2" in str(r) for r in refused)
                assert (await engine.snapshot())["num_rejected"] == len(refused)
                with pytest.raises(InvalidRequestError, match="scheduling_policy"):
                    await collect(engine.generate([5], DELTAS, priority=1))

        run(scenario)
