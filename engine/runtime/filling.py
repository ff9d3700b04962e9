"""Makes the executables of an engine in threads: those first that a first request needs, the rest while it serves.

The problem: a start makes some sixty executables, and a first request needs six of them. The idea: one queue of jobs
in the order in which they will be wanted; the start waits for its first few, and a step that needs one that is not
there yet has it made next. How a job makes its executable (compile, or read from a bundle) is not known here.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import CompileConfig
from engine.runtime.compile import COUNTER
from engine.runtime.progress import Report

logger = logging.getLogger("quire.compile")
MOST_THREADS = 8

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """One executable.

    Attributes:
        key: what it is looked up by.
        name: for people, and in bundles; no two jobs of an engine share one.
        lower: traces and lowers it; `.compile()` of that is the executable.
    """

    key: Hashable
    name: str
    lower: Callable[[], Any]


def compiled(job: Job) -> Compiled:
    """Make a job's executable by tracing, lowering and compiling it."""
    return job.lower().compile()


@dataclass(frozen=True)
class FillingStats:
    """How far it is.

    Attributes:
        num_ready, num_all: executables.
        num_waits, waited_s: how often, and how long in all, somebody waited for one after the start.
    """

    num_ready: int
    num_all: int
    num_waits: int
    waited_s: float


class Filling:
    """Makes executables. `start` it once; everything else may be called from any thread.

    Args:
        jobs: most wanted first.
        make: makes the executable of a job. Tracing holds the interpreter; compiling and reading do not.
        threads: how many jobs run at a time while somebody waits for the start.

    Attributes:
        ready: key -> executable. Only grows.
    """

    def __init__(self, jobs: Sequence[Job], make: Callable[[Job], Compiled], threads: int) -> None:
        self.ready: dict[Hashable, Compiled] = {}
        self._jobs = {job.key: job for job in jobs}
        self._waiting = list(jobs)
        self._make = make
        self._threads = [
            threading.Thread(target=self._work, args=[index], name=f"quire-compile-{index}", daemon=True)
            for index in range(min(threads, len(jobs)))
        ]
        self._changed = threading.Condition()
        self._failed: dict[Hashable, Exception] = {}
        self._most_at_work = len(self._threads)
        self._num_waits, self._waited_s = 0, 0.0

    @classmethod
    def of(cls, jobs: Sequence[Job], config: CompileConfig, make: Callable[[Job], Compiled] = compiled) -> Filling:
        """One with as many threads as the configuration says."""
        return cls(jobs, make, config.compile_threads or min(MOST_THREADS, os.cpu_count() or 1))

    @property
    def keys(self) -> list[Hashable]:
        """Of all executables."""
        return list(self._jobs)

    @property
    def stats(self) -> FillingStats:
        """How far it is."""
        with self._changed:
            return FillingStats(len(self.ready), len(self._jobs), self._num_waits, self._waited_s)

    @property
    def done(self) -> bool:
        """Nothing is left to be made."""
        return len(self.ready) + len(self._failed) == len(self._jobs)

    def start(self) -> None:
        """Begin. At the end of the process what runs then is waited for: a compilation cannot be interrupted."""
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()

    def wait_for_first(self, keys: Iterable[Hashable], report: Report) -> None:
        """Wait until these are there; then half of the threads go on with the rest, and the others are left to steps.

        Args:
            report: called as they come.

        Raises:
            Exception: as making one of them raised.
        """
        wanted = set(keys)
        total, shown = len(wanted), -1
        with self._changed:
            while True:
                self._raise_failed(wanted)
                left = wanted - self.ready.keys()
                if total - len(left) > shown:
                    shown = total - len(left)
                    report(shown, total, "")
                if not left:
                    break
                self._changed.wait()
            self._most_at_work = max(1, len(self._threads) // 2)

    def wait_for_all(self) -> None:
        """Return when nothing is left to be made.

        Raises:
            Exception: as making one of them raised.
        """
        with self._changed:
            while not self.done:
                self._changed.wait()
            self._raise_failed(set(self._jobs))

    def by_name(self) -> dict[str, Compiled]:
        """What is there, by name."""
        return {self._jobs[key].name: compiled for key, compiled in list(self.ready.items())}

    def wait_for(self, key: Hashable) -> Compiled:
        """The executable of a key, made next if it is not there yet.

        Raises:
            KeyError: no job has this key: a shape escaped its bucket.
            Exception: as making it raised.
        """
        started = time.monotonic()
        with self._changed:
            job = self._jobs[key]
            if job in self._waiting:
                self._waiting.remove(job)
                self._waiting.insert(0, job)
            while key not in self.ready:
                self._raise_failed({key})
                self._changed.wait()
            self._num_waits += 1
            self._waited_s += time.monotonic() - started
        logger.info("a step waited %.2f s for %s", time.monotonic() - started, job.name)
        return self.ready[key]

    def stop(self) -> None:
        """Leave what is not begun, wait for what is. A second call does no harm."""
        with self._changed:
            for job in self._waiting:
                self._failed[job.key] = RuntimeError("the engine was shut down.")
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()
        atexit.unregister(self.stop)

    def _raise_failed(self, keys: set[Hashable]) -> None:
        for key in keys & self._failed.keys():
            raise self._failed[key]

    def _work(self, index: int) -> None:
        with COUNTER.expected():
            while True:
                with self._changed:
                    if not self._waiting or index >= self._most_at_work:
                        break
                    job = self._waiting.pop(0)
                self._run(job)
        if self.done:
            atexit.unregister(self.stop)  # or executables would stay when their engine has gone

    def _run(self, job: Job) -> None:
        started, made, failure = time.monotonic(), None, None
        try:
            made = self._make(job)
        except Exception as error:
            failure = error
            logger.error("%s cannot be made: %s", job.name, error)
        with self._changed:
            if failure is None:
                assert made is not None
                self.ready[job.key] = made
            else:
                self._failed[job.key] = failure
            self._changed.notify_all()
        logger.debug("made %s in %.2f s", job.name, time.monotonic() - started)
