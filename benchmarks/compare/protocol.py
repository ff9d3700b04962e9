"""What driver and workers say to each other: one JSON object per line, over the worker's stdin and stdout.

    driver                                worker
    {"op": "load", "settings": {…}}   →   {"value": Loaded}
    {"op": "run", "job": Job}         →   {"value": Sample}     as often as wanted
    {"op": "ceilings"}                →   {"value": {…}}
    {"op": "stop"}                    →   (exits)

An operation that raises is answered with {"error": "…"} and the worker goes on. Workers run under other engines'
environments: this file keeps to Python 3.11 and the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.ceilings import Ceilings

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True)
class Job:
    """Requests that are there all at once.

    Attributes:
        prompts: token ids of each.
        output_lens: tokens to generate for each, exactly: greedy, end-of-sequence ignored.
        variant: which of the peer's ways to run it; "" if it has only one.
        stream: report the time of every token. Then there is one request.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    variant: str = ""
    stream: bool = False


@dataclass(frozen=True)
class Sample:
    """One measured job. Times in seconds from the moment the first request is handed over.

    Attributes:
        wall_s: until the last request is complete.
        token_times_s: when each output of a streamed job was handed out (usually one token each); else empty.
        outputs: the generated ids of each request.
        num_cached_tokens: prompt tokens taken from a prefix cache; None if the engine does not say.
    """

    wall_s: float
    outputs: list[list[int]]
    token_times_s: list[float] = field(default_factory=list)
    num_cached_tokens: int | None = None


@dataclass(frozen=True)
class Loaded:
    """A worker is ready.

    Attributes:
        versions: of what it runs on, by distribution.
        about: whatever else a reader of the results may want to know: settings, sizes, implementations.
    """

    versions: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)


class EngineUnderTest(Protocol):
    """What a worker module offers; `serve` does the rest."""

    def load(self, settings: dict[str, Any]) -> Loaded:
        """Import the engine, load the model, generate one token."""
        ...

    def run(self, job: Job) -> Sample:
        """Run one job. The clock runs from the hand-over of the requests, not from their parsing."""
        ...

    def ceilings(self) -> Ceilings:
        """What the machine reaches through this engine's library."""
        ...


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._started


def serve(engine: EngineUnderTest) -> None:
    """Answer the driver until it says stop or goes away. Whatever the engine prints to stdout goes to stderr."""
    end_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    operations: dict[str, Callable[[dict[str, Any]], Any]] = {
        "load": lambda message: asdict(engine.load(message["settings"])),
        "run": lambda message: asdict(engine.run(Job(**message["job"]))),
        "ceilings": lambda message: engine.ceilings().as_json(),
    }
    for message in _messages():
        if message["op"] == "stop":
            break
        try:
            reply = {"value": operations[message["op"]](message)}
        except Exception as error:  # the driver counts it; the worker must go on
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux). A stopped worker could not even see that its
    stdin was closed, and would keep its memory for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _messages() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)
