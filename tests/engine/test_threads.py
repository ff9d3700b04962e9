"""XLA's worker threads on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.runtime import threads
from engine.runtime.threads import WORKER_NAME, pin_workers
from tests.engine.conftest import MakeEngine

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can be pinned on Linux only")


def _tasks(root: Path, names: dict[int, str]) -> Path:
    for thread, name in names.items():
        (root / str(thread)).mkdir()
        (root / str(thread) / "comm").write_text(name + "\n")
    return root


@linux
def test_each_worker_gets_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, set[int]] = {}
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {4, 2})
    monkeypatch.setattr(threads.os, "sched_setaffinity", lambda thread, cores: pinned.update({thread: cores}))
    assert pin_workers(_tasks(tmp_path, {12: WORKER_NAME, 7: WORKER_NAME, 9: "python"})) == 2
    assert pinned == {7: {2}, 12: {4}}


@linux
def test_another_number_of_workers_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(threads.os, "sched_setaffinity", lambda *_: pytest.fail("pinned"))
    assert pin_workers(_tasks(tmp_path, {7: WORKER_NAME, 8: WORKER_NAME})) == 0
    assert pin_workers(tmp_path / "missing") == 0


@linux
def test_an_engine_pins_real_workers(make_engine: MakeEngine) -> None:
    """The name is XLA's: this fails when it changes."""
    make_engine()
    workers = threads._workers(threads.TASKS)
    assert len(workers) == len(os.sched_getaffinity(0))
    assert sorted(core for worker in workers for core in os.sched_getaffinity(worker)) == sorted(
        os.sched_getaffinity(0)
    )
