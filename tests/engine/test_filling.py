"""Executables that are made while an engine serves: order, waiting, failures, the end; and one engine that does so."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from engine.runtime.buckets import Bucket, BucketTable
from engine.runtime.compile import COMPILE_EVENT, COUNTER
from engine.runtime.filling import Compiled, Filling, Job
from engine.runtime.lookup import Executables, by_need, first_keys, hull_keys
from engine.runtime.sampling import SamplerVariant

TABLE = BucketTable(max_num_tokens=256, max_num_seqs=16)
WAIT_S = 20


def no_report(done: int, total: int, what: str) -> None:
    pass


def jobs_of(table: BucketTable) -> list[Job]:
    """One per forward bucket and sampler, in an order that nobody wants."""
    forward = [Job(("forward", bucket), f"forward {bucket}", lambda: None) for bucket in table.all()]
    sample = [
        Job(("sample", seqs, variant), f"sample {seqs} {variant}", lambda: None)
        for seqs in sorted({bucket.num_seqs for bucket in table.all()})
        for variant in SamplerVariant
    ]
    return [Job("score", "score", lambda: None), *reversed(forward), *sample]


def named(job: Job) -> Compiled:
    """An executable that says what it is."""
    return lambda: job.name


class Gate:
    """Makes executables one at a time, as it is told to, and notes the order."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self._permits = threading.Semaphore(0)

    def allow(self, count: int) -> None:
        for _ in range(count):
            self._permits.release()

    def make(self, job: Job) -> Compiled:
        assert self._permits.acquire(timeout=WAIT_S)
        self.made.append(job.key)
        return named(job)


@pytest.fixture
def filled() -> Any:
    """(make, threads) -> a filling that was started; all are stopped in the end."""
    started: list[Filling] = []

    def start(make: Callable[[Job], Compiled], threads: int = 1) -> Filling:
        filling = Filling(by_need(jobs_of(TABLE), TABLE), make, threads)
        filling.start()
        started.append(filling)
        return filling

    yield start
    for filling in started:
        filling.stop()


def test_a_first_request_comes_first_and_what_holds_any_step_next() -> None:
    keys = [job.key for job in by_need(jobs_of(TABLE), TABLE)]
    assert sorted(map(str, keys)) == sorted(str(job.key) for job in jobs_of(TABLE))
    first, hull = first_keys(TABLE), [key for key in hull_keys(TABLE) if key not in first_keys(TABLE)]
    assert keys[: len(first) + len(hull)] == [*first, *hull]
    assert ("forward", Bucket(1, 1)) in first and ("forward", Bucket(256, 16)) in hull


def test_the_start_waits_for_the_first_few_only(filled: Any) -> None:
    gate, first = Gate(), first_keys(TABLE)
    filling = filled(gate.make)
    gate.allow(len(first))
    filling.wait_for_first(first, no_report)
    assert set(first) <= filling.ready.keys() and not filling.done
    gate.allow(1000)
    filling.wait_for_all()
    assert filling.done and filling.stats.num_ready == filling.stats.num_all == len(jobs_of(TABLE))
    assert filling.stats.num_waits == 0


def test_a_step_runs_in_the_next_larger_shape_that_is_there(filled: Any) -> None:
    gate = Gate()
    filling = filled(gate.make)
    executables = Executables(filling)
    gate.allow(len(first_keys(TABLE)))
    filling.wait_for_first(first_keys(TABLE), no_report)
    assert executables.choose(TABLE, 1, 1) == Bucket(1, 1)
    assert executables.choose(TABLE, 10, 2) == Bucket(64, 8) != TABLE.choose(10, 2)
    assert executables.choose(TABLE, 200, 12) == TABLE.choose(200, 12)  # nothing that is there holds it: it will wait
    gate.allow(1000)
    filling.wait_for_all()
    assert executables.choose(TABLE, 10, 2) == TABLE.choose(10, 2)


def test_what_a_step_waits_for_is_made_next(filled: Any) -> None:
    gate, wanted = Gate(), "score"  # the last of all
    filling, got = filled(gate.make), []
    waiter = threading.Thread(target=lambda: got.append(filling.wait_for(wanted)()))
    waiter.start()
    gate.allow(1)  # the one that was begun before
    for _ in range(3):
        gate.allow(1)
        waiter.join(timeout=1)
    waiter.join(WAIT_S)
    assert got == ["score"] and wanted in gate.made[:4]
    assert filling.stats.num_waits == 1 and filling.stats.waited_s > 0


def test_a_failure_reaches_whoever_waits_and_nobody_else(filled: Any) -> None:
    def make(job: Job) -> Compiled:
        if job.key == "score":
            raise RuntimeError("no such instruction")
        return named(job)

    filling = filled(make, threads=2)
    filling.wait_for_first(first_keys(TABLE), no_report)
    with pytest.raises(RuntimeError, match="no such instruction"):
        filling.wait_for("score")
    with pytest.raises(RuntimeError, match="no such instruction"):
        filling.wait_for_all()
    with pytest.raises(KeyError):
        filling.wait_for(("forward", Bucket(3, 3)))  # a shape that nobody planned


def test_stopping_frees_whoever_waits(filled: Any) -> None:
    gate, errors = Gate(), []
    filling = filled(gate.make)

    def wait() -> None:
        try:
            filling.wait_for("score")
        except RuntimeError as error:
            errors.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    stopper = threading.Thread(target=filling.stop)
    stopper.start()
    gate.allow(2)  # what was begun is waited for; "score" may be it
    stopper.join(WAIT_S)
    waiter.join(WAIT_S)
    assert not stopper.is_alive() and not waiter.is_alive()
    assert len(gate.made) <= 2 and (errors or "score" in gate.made)


def test_planned_compilations_are_no_defect_in_their_own_thread_only() -> None:
    before = COUNTER.after_ready
    with COUNTER.expected():
        COUNTER._on_event(COMPILE_EVENT, 1.0)
        assert COUNTER.after_ready == before
        other = threading.Thread(target=COUNTER._on_event, args=[COMPILE_EVENT, 1.0])
        other.start()
        other.join()
    assert COUNTER.after_ready == before + 1
    COUNTER.after_ready = before


def test_nothing_keeps_executables_once_they_are_made() -> None:
    """On a CPU each takes some fifty memory mappings, of which a process has only so many."""
    filling = Filling(jobs_of(TABLE), named, 2)
    filling.start()
    filling.wait_for_all()
    for thread in filling._threads:
        thread.join(WAIT_S)
    gone = weakref.ref(filling)
    del filling, thread
    gc.collect()
    assert gone() is None


def test_what_runs_is_known_although_nothing_was_traced_before(compilation_cache: str) -> None:
    """In the background nothing is compiled to learn its size: operations are chosen by tracing the first shapes."""
    code = (
        "from engine import Engine; from tests.engine.helpers import SMALL, TINY\n"
        f"with Engine(str(TINY / 'llama'), **SMALL, compilation_cache_dir={compilation_cache!r},"
        " compile_in_background=True) as engine: print(sorted(engine.describe()['implementations']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['kv_write', 'matmul', 'paged_attention', 'rowwise']", done.stderr[-2000:]
