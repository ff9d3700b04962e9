"""Runs bodies of tests in JAX's simulator of a GPU, in another process.

In another process, because a kernel that waits for an arrival that never comes waits forever, and because the simulator
keeps global state. One worker serves many cases, so that JAX is imported once; it is replaced after every case that
failed, and a case that hangs ends by the worker's own alarm, with the lines at which every thread stood.

    def copies(case: Case) -> np.ndarray: ...       # at the top level of a module: it travels by name

    def test_copies(case):
        np.testing.assert_array_equal(simulated(copies, case), expected)

The worker fails a case if any kernel that it ran has a race (not only the last), or if a deprecated API was used.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, BinaryIO, Literal

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0  # for importing JAX on a busy machine
GRACE_S = 10.0  # after the worker's own alarm
REPORT_CHARACTERS = 6000
# Of XLA's thread pool. Every warpgroup of a kernel is a callback that may wait for another one: with as many threads as
# cores, two of them have been seen to hang.
NUM_THREADS = "16"


class SimulationError(AssertionError):
    """A simulated case failed."""


class RaceError(SimulationError):
    """Two accesses are not ordered: a barrier wait, an arrival or a `commit_smem` is missing."""


class HangError(SimulationError):
    """The case did not end in time: most likely a wait for an arrival that never comes."""


class BodyError(SimulationError):
    """The body raised; the message holds its traceback."""


@dataclass(frozen=True)
class Task:
    """What a worker runs: `body(*arguments)`, and ends by itself if that takes longer than `timeout_s`."""

    body: Callable[..., Any]
    arguments: tuple[Any, ...]
    timeout_s: float


@dataclass(frozen=True)
class Answer:
    """What a worker says of a task.

    Attributes:
        verdict: of the task; "race" also if the body failed after a race, which is then the cause.
        value: what the body returned, arrays as NumPy's.
        detail: why it failed.
        num_kernels: kernels that were simulated.
    """

    verdict: Literal["passed", "race", "failed"]
    value: Any
    detail: str
    num_kernels: int


class Worker:
    """A process that runs tasks, one at a time."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._log: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.simulator_worker", str(theirs.fileno())],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "NPROC": NUM_THREADS},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._started = self._receive(START_S) is not None

    def run(self, task: Task) -> Answer:
        """Run a task.

        Raises:
            HangError: it did not end.
            SimulationError: the worker ended for another reason.
        """
        position, begin = self._log.seek(0, os.SEEK_END), time.monotonic()
        answer = None
        if self._started:
            self._connection.send(task)
            answer = self._receive(task.timeout_s + GRACE_S)
        if answer is not None:
            return answer
        took = time.monotonic() - begin
        self.close()
        printed = self.printed(position)
        if self._started and took >= task.timeout_s:
            raise HangError(f"did not end in {task.timeout_s:g} s. Where each thread stood:\n{printed}")
        raise SimulationError(f"the worker ended with exit status {self.process.returncode}:\n{printed}")

    def printed(self, position: int) -> str:
        """What the worker wrote from a position of its log on, shortened from the front."""
        self._log.seek(position)
        return self._log.read().decode(errors="replace")[-REPORT_CHARACTERS:]

    def log_position(self) -> int:
        """The end of the log."""
        return self._log.seek(0, os.SEEK_END)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self._connection.close()

    def _receive(self, timeout_s: float) -> Any:
        """The next message, None if the worker ended or said nothing in time."""
        try:
            return self._connection.recv() if self._connection.poll(timeout_s) else None
        except (EOFError, ConnectionResetError):
            return None


class Pool:
    """One worker, replaced when it may be damaged."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self.num_started = 0

    def run(self, task: Task, name: str) -> Answer:
        """Run a task in a worker that no failed task has touched.

        Raises:
            SimulationError: of the kind that fits; the message begins with `name`.
        """
        if self._worker is None:
            self._worker = Worker()
            self.num_started += 1
        worker, position = self._worker, self._worker.log_position()
        try:
            answer = worker.run(task)
        except SimulationError as error:
            self._worker = None
            raise type(error)(f"{name}: {error}") from None
        if answer.verdict == "passed":
            return answer
        self.close()
        kind = RaceError if answer.verdict == "race" else BodyError
        raise kind(f"{name}: {answer.detail}\n{worker.printed(position)}")

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


POOL = Pool()
atexit.register(POOL.close)


def simulated(body: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0, num_kernels: int = 1) -> Any:
    """Run `body(*arguments)` in a worker, and require that it ends, is free of races and used nothing deprecated.

    Args:
        body: a function at the top level of a module; it may assert.
        arguments: what pickle takes, such as frozen dataclasses and NumPy arrays.
        timeout_s: for this case. A simulated kernel takes about 2 s and 0.2 s per block.
        num_kernels: least number of kernels that must have been simulated: a body that ran something else proves
            nothing.

    Returns:
        What the body returned, with NumPy's arrays for JAX's.

    Raises:
        SimulationError: `RaceError`, `HangError` or `BodyError`.
    """
    name = f"{body.__module__}.{body.__qualname__}({', '.join(map(_shown, arguments))})"
    answer = POOL.run(Task(body, arguments, timeout_s), name)
    if answer.num_kernels < num_kernels:
        raise SimulationError(f"{name}: simulated {answer.num_kernels} kernels, expected {num_kernels} or more")
    return answer.value


def _shown(argument: Any) -> str:
    text = repr(argument)
    return text if len(text) <= 300 else f"{text[:300]}…"
