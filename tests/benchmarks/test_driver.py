"""The driver with workers that have no engine behind them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare import driver
from benchmarks.compare.driver import Comparison, MeasurementError, Plan, check, shape_of, turns, with_agreement
from benchmarks.compare.journal import FILE, Journal, JournalError
from benchmarks.compare.peer import ModelForm, Peer
from benchmarks.compare.process import WorkerError, WorkerGoneError, WorkerProcess
from benchmarks.compare.protocol import Job, Sample
from benchmarks.compare.registry import DEFAULT, PEERS, REFERENCE
from benchmarks.compare.results import Lane, Measurement, Start
from benchmarks.compare.starts import StartTimer
from benchmarks.compare.worker_transformers import batches_of
from benchmarks.workloads.cpu_smollm2 import ALL, WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_worker.py")
STREAMED = Workload("w1", "streamed", (4,), (3,), streamed=True)
BATCH = Workload("w4", "batch", (6, 6), (2, 5), shared_prefix_len=4)
ONE_TOKEN = Workload("w3", "one token", (5,), (1,))  # fakes misbehave here


def _peer(name: str, **settings: object) -> Peer:
    variants = settings.pop("variants", {})
    settings = {"first_token": 100} | settings
    return Peer(name, name, "", "", ModelForm.REFERENCE, variants=variants, settings=settings)  # type: ignore[arg-type]


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., object]:
    """Makes a comparison of fake peers; each worker logs to runs.txt."""

    @contextmanager
    def make(
        *peers: Peer,
        workloads: tuple[Workload, ...],
        reps: int = 1,
        timeout_s: float = 20.0,
        deadline: float | None = None,
        resume: bool = False,
    ) -> Iterator:
        def start(peer: Peer) -> WorkerProcess:
            variables = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
            return WorkerProcess([sys.executable, str(FAKE)], variables, tmp_path, tmp_path / f"{peer.name}.log")

        plan = Plan(peers, workloads, reps, timeout_s, deadline=deadline)
        journal = Journal(tmp_path, {"dtype": "float32"}, resume=resume)
        log = {"log": str(tmp_path / "runs.txt")}
        with Comparison(plan, start, lambda peer: log | dict(peer.settings), journal, lambda line: None) as comparison:
            yield comparison, journal

    return make


def _measured(journal: Journal) -> list[Measurement]:
    return [measurement for measurement, _ in journal.measurements]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _is_alive(pid: int) -> bool:
    """False too for a process that ended and that nobody has asked about yet."""
    try:
        return _state(pid) != "Z"
    except FileNotFoundError:
        return False


def _is_stopped(pid: int, patience_s: float = 5.0) -> bool:
    """True once the process is stopped: the signal takes a moment to arrive."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if _state(pid) == "T":
            return True
        time.sleep(0.01)
    return False


def test_the_lane_that_starts_moves_on() -> None:
    plan = Plan((_peer("a", variants={"w3": ("x", "y")}), _peer("b")), (STREAMED, ONE_TOKEN), 2, 1.0)
    order = [(repetition, w.name, str(lane)) for repetition, w, lane in turns(plan)]
    assert [turn for turn in order if turn[:2] == (0, "w3")] == [(0, "w3", "a (x)"), (0, "w3", "a (y)"), (0, "w3", "b")]
    assert [turn[2] for turn in order if turn[:2] == (1, "w3")] == ["a (y)", "b", "a (x)"]
    assert [turn[2] for turn in order if turn[:2] == (1, "w1")] == ["b", "a"]
    assert [turn[0] for turn in order] == sorted(turn[0] for turn in order)
    assert len(order) == 3 * (3 + 2)


def test_only_the_warm_up_of_w2_is_cut() -> None:
    assert shape_of(WORKLOADS["w2"], 0).num_requests == 8
    assert shape_of(WORKLOADS["w2"], 1) == WORKLOADS["w2"]
    assert shape_of(WORKLOADS["w4"], 0) == WORKLOADS["w4"]


def test_other_work_than_asked_for_is_refused() -> None:
    job = Job([[1], [2]], [2, 3])
    check(job, Sample(1.0, [[1, 1], [1, 1, 1]]))
    for outputs in ([[1, 1]], [[1, 1], [1, 1]], [[1, 1], [1, 1, 1, 1]]):
        with pytest.raises(MeasurementError):
            check(job, Sample(1.0, outputs))
    stream = Job([[1]], [2], stream=True)
    check(stream, Sample(1.0, [[1, 1]], [0.5, 0.9]))
    for times in ([], [0.9, 0.5], [0.5, 1.5]):
        with pytest.raises(MeasurementError, match="times of a streamed job"):
            check(stream, Sample(1.0, [[1, 1]], times))


def test_engines_take_turns_one_at_a_time(compare: Callable, tmp_path: Path) -> None:
    with compare(_peer("a"), _peer("b"), workloads=(STREAMED, BATCH), reps=2) as (comparison, journal):
        comparison.load()
        assert comparison.measure() == 0
    facts, measured = journal.peers, _measured(journal)
    assert all(m.error is None for m in measured) and len(measured) == 3 * 2 * 2
    assert facts["a"].versions == {"fake": "1.0"} and facts["a"].start_s > 0
    lines = (tmp_path / "runs.txt").read_text().split("\n")[:-1]
    begins, ends = lines[::2], lines[1::2]
    assert [line.removeprefix("begin ") for line in begins] == [line.removeprefix("end ") for line in ends]
    pids = {str(facts[name].details["pid"]): name for name in facts}
    assert [pids[line.split()[1]] for line in ends] == [m.lane.peer for m in measured]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_are_stopped_between_their_turns(compare: Callable) -> None:
    with compare(_peer("a"), _peer("b"), workloads=(STREAMED,)) as (comparison, journal):
        comparison.load()
        facts = journal.peers
        assert all(_is_stopped(facts[name].details["pid"]) for name in "ab")
        comparison.ceilings()
        assert journal.ceilings.read_bytes_per_s == {"fake": 100.0}
        assert all(_is_stopped(facts[name].details["pid"]) for name in "ab")
    assert not any(Path(f"/proc/{facts[name].details['pid']}").exists() for name in "ab")


_DRIVER = """
import os, sys, time
from pathlib import Path
from benchmarks.compare.process import WorkerProcess
worker = WorkerProcess([sys.executable, sys.argv[1]], dict(os.environ), Path("."), Path(sys.argv[2]))
with worker.awake():
    about = worker.ask("load", 20.0, settings={})["about"]
print(about["pid"], flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_stopped_workers_do_not_outlive_a_driver_that_is_killed(tmp_path: Path) -> None:
    variables = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _DRIVER, str(FAKE), str(tmp_path / "log")]
    driver_process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    assert driver_process.stdout is not None
    pid = int(driver_process.stdout.readline())
    assert _is_stopped(pid)
    driver_process.kill()
    driver_process.wait()
    try:
        deadline = time.monotonic() + 5.0
        while _is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _is_alive(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_agreement_with_the_first_engine(compare: Callable) -> None:
    with compare(_peer("a"), _peer("b"), _peer("c", first_token=7), workloads=(BATCH,)) as (comparison, journal):
        comparison.load()
        comparison.measure()
    found = {m.lane.peer: m.agreement for m in with_agreement(journal, "a")}
    assert found == {"a": None, "b": 1.0, "c": 0.0}


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        ("short", "MeasurementError: 1 of 1 requests were answered, 1 of them with another number"),
        ("raise", "WorkerError: ValueError: this engine cannot do that"),
        ("die", "WorkerGoneError: the worker ended"),
    ],
)
def test_a_failure_is_counted_and_the_rest_goes_on(compare: Callable, misbehave: str, message: str) -> None:
    bad = _peer("bad", misbehave=misbehave)
    with compare(_peer("a"), bad, workloads=(ONE_TOKEN, BATCH)) as (comparison, journal):
        comparison.load()
        comparison.measure()
    measured = _measured(journal)
    failed = [m for m in measured if m.error is not None]
    assert [(m.lane.peer, m.workload) for m in failed] == [("bad", "w3"), ("bad", "w3")]
    assert all(m.error is not None and m.error.startswith(message) for m in failed)
    assert sum(m.lane.peer == "bad" and m.error is None for m in measured) == 2  # started again after it died


def test_a_streamed_job_with_impossible_times_fails(compare: Callable) -> None:
    workload = replace(STREAMED, output_lens=(1,))
    with compare(_peer("bad", misbehave="unordered"), workloads=(workload,)) as (comparison, journal):
        comparison.load()
        comparison.measure()
    assert all("times of a streamed job" in (m.error or "") for m in _measured(journal))


def test_a_worker_that_hangs_is_ended(compare: Callable) -> None:
    with compare(_peer("bad", misbehave="hang"), workloads=(ONE_TOKEN,), reps=0, timeout_s=3.0) as (
        comparison,
        journal,
    ):
        comparison.load()
        comparison.measure()
        measurement = _measured(journal)[0]
        assert measurement.error is not None and "did not answer within 3 s" in measurement.error
        assert not Path(f"/proc/{journal.peers['bad'].details['pid']}").exists()


def test_a_worker_that_cannot_load_stops_the_comparison(compare: Callable) -> None:
    with compare(Peer("bad", "", "", "", ModelForm.REFERENCE), workloads=(BATCH,)) as (comparison, journal):
        comparison.load()
        comparison.measure()
    assert all((m.error or "").startswith("WorkerError: KeyError") for m in _measured(journal))


def test_a_worker_that_does_not_start_says_why(tmp_path: Path) -> None:
    worker = WorkerProcess([sys.executable, "-c", "raise SystemExit('no such engine')"], {}, tmp_path, tmp_path / "log")
    with pytest.raises(WorkerGoneError, match="no such engine"):
        worker.ask("load", 20.0, settings={})
    with pytest.raises(WorkerGoneError, match="ended earlier"):
        worker.ask("load", 20.0, settings={})
    worker.close()


def test_an_error_of_a_worker_is_told(compare: Callable) -> None:
    with compare(_peer("a"), workloads=(BATCH,)) as (comparison, journal):
        comparison.load()
        worker = comparison._workers["a"]
        with worker.awake(), pytest.raises(WorkerError, match="KeyError"):
            worker.ask("no such operation", 20.0)


def test_the_registry_is_sound() -> None:
    assert REFERENCE in PEERS and set(DEFAULT) <= set(PEERS)
    for name, peer in PEERS.items():
        assert peer.name == name and peer.about
        assert {*peer.variants, *peer.unsupported} <= set(ALL)
        assert any(peer.variants_of(name) for name in ALL)
        assert (ROOT / Path(*peer.module.split("."))).with_suffix(".py").is_file()
    assert Lane("transformers", "batch-all") in {lane for _, _, lane in turns(_default_plan())}


def _default_plan() -> Plan:
    return Plan(tuple(PEERS[name] for name in DEFAULT), tuple(WORKLOADS.values()), 1, 1.0)


def test_sorted_batches_hold_every_request_once() -> None:
    lengths = list(WORKLOADS["w2"].output_lens)
    batches = batches_of(lengths, 16)
    assert [len(batch) for batch in batches] == [16] * 4
    assert sorted(index for batch in batches for index in batch) == list(range(64))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)
    assert batches_of(lengths, None) == [list(range(64))]


def test_quiet_is_waited_for_before_every_turn(compare: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(driver, "wait_until_quiet", waits.append)
    with compare(_peer("a"), workloads=(BATCH,)) as (comparison, journal):
        comparison.load()
        comparison.measure()
    assert waits == [0.0, 0.0]


def test_a_run_goes_on_where_it_stopped(compare: Callable, tmp_path: Path) -> None:
    peers = (_peer("a"), _peer("b"))
    with compare(*peers, workloads=(BATCH,), reps=1) as (comparison, journal):
        comparison.load()
        assert comparison.measure() == 0
    first = journal.measurements
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"measurement": {"workload": "w')  # killed while it wrote
    with compare(*peers, _peer("c"), workloads=(BATCH,), reps=2, resume=True) as (comparison, journal):
        assert journal.measurements == first
        comparison.load()
        assert comparison.measure() == 0
    added = [(m.repetition, m.lane.peer) for m in _measured(journal)[len(first) :]]
    assert added == [(0, "c"), (1, "c"), (2, "c"), (2, "a"), (2, "b")]
    again = Journal(tmp_path, {"dtype": "float32"}, resume=True)
    assert again.measurements == journal.measurements and again.peers == journal.peers
    assert [m.agreement for m in with_agreement(again, "a") if m.lane.peer == "c"] == [1.0, 1.0, 1.0]


def test_parts_of_different_runs_are_not_put_together(tmp_path: Path) -> None:
    Journal(tmp_path, {"dtype": "float32", "commit": "1"}, resume=True)
    with pytest.raises(JournalError, match="--resume goes on with them"):
        Journal(tmp_path, {"dtype": "float32", "commit": "1"}, resume=False)
    with pytest.raises(JournalError, match="commit: '1', now '2'"):
        Journal(tmp_path, {"dtype": "float32", "commit": "2"}, resume=True)


def test_nothing_begins_after_the_deadline(compare: Callable) -> None:
    with compare(_peer("a"), workloads=(BATCH,), deadline=time.monotonic()) as (comparison, journal):
        assert comparison.load() == 2
        assert comparison.measure() == 2
        assert journal.measurements == []


def test_what_is_unsupported_has_no_turn() -> None:
    plan = Plan((_peer("a"), replace(_peer("b"), unsupported={"w3": "why"})), (ONE_TOKEN, BATCH), 0, 1.0)
    assert [(w.name, lane.peer) for _, w, lane in turns(plan)] == [("w3", "a"), ("w4", "a"), ("w4", "b")]


def test_starts_are_cold_then_warm_and_taken_once(tmp_path: Path) -> None:
    peer = replace(_peer("a"), cache_variables=("FAKE_CACHE",))
    given: list[str] = []

    def start(peer: Peer, variables: Mapping[str, str]) -> WorkerProcess:
        given.append(variables["FAKE_CACHE"])
        environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)} | dict(variables)
        return WorkerProcess([sys.executable, str(FAKE)], environment, tmp_path, tmp_path / "a.log")

    plan, journal = Plan((peer,), (), 0, 20.0), Journal(tmp_path, {}, resume=False)
    for repetitions in (1, 1, 2):
        assert StartTimer(plan, start, lambda _: {}, journal, lambda line: None).measure(repetitions) == 0
    assert [(s.repetition, s.is_cold, s.error) for s in journal.starts] == [
        (1, True, None),
        (1, False, None),
        (2, True, None),
        (2, False, None),
    ]
    assert given[0] == given[1] != given[2] == given[3]
    assert journal.peers["a"].versions == {"fake": "1.0"}  # the report has a row of it
    assert all(isinstance(s, Start) and s.seconds is not None and s.seconds > 0 for s in journal.starts)
    assert StartTimer(replace(plan, deadline=0.0), start, lambda _: {}, journal, lambda line: None).measure(3) == 2
