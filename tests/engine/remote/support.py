"""What tests of the engine's process share: a loop that lives as long as the engine, and looks at processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import uvloop

from engine.outputs import RequestOutput
from engine.remote.client import RemoteEngine
from engine.sampling_params import RequestOutputKind, SamplingParams
from tests.engine.helpers import SMALL, TINY

MODEL = str(TINY / "llama")
TIMEOUT_S = 90  # a test that waits longer hangs
# Fewer executables than `SMALL` needs: for tests that start an engine of their own.
SMALLEST = {**SMALL, "max_num_seqs": 2, "max_num_batched_tokens": 16}
WORKERS = "tests.engine.remote.workers"
DELTAS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, output_kind=RequestOutputKind.DELTA)


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    """All outputs of a stream."""
    return [output async for output in stream]


async def bounded[T](scenario: Callable[[], Awaitable[T]]) -> T:
    """A hang becomes a failure."""
    async with asyncio.timeout(TIMEOUT_S):
        return await scenario()


def run[T](scenario: Callable[[], Awaitable[T]]) -> T:
    """One event loop for one scenario."""
    return uvloop.run(bounded(scenario))


async def start(cache: str, **settings: object) -> RemoteEngine:
    """An engine that a test may kill."""
    return await RemoteEngine.start(MODEL, compilation_cache_dir=cache, **{**SMALLEST, **settings})


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int, timeout_s: float = 20.0) -> None:
    """Wait until a process has ended.

    Raises:
        AssertionError: it has not.
    """
    end = time.monotonic() + timeout_s
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} still lives"
        time.sleep(0.02)


async def until_healthy(engine: RemoteEngine) -> None:
    """Wait until requests are served again."""
    while engine.pid is None:
        await asyncio.sleep(0.02)
