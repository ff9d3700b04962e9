"""Starts the workers, then asks one after the other: repetition by repetition, workload by workload, lane by lane."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.compare.audit import Audit, wait_until_quiet
from benchmarks.compare.journal import Journal, Outputs
from benchmarks.compare.peer import Peer
from benchmarks.compare.process import WorkerError, WorkerGoneError, WorkerProcess
from benchmarks.compare.protocol import Job, Loaded, Sample
from benchmarks.compare.results import WARM_UP, Lane, Measurement, PeerFacts, agreement
from benchmarks.workloads.cpu_smollm2 import STREAMS, Workload

# (requests, most output tokens): a whole warm-up of these would take minutes per lane.
WARM_UP_CUT = {"w2": (8, 16)} | {name: (stream.num_requests, 4) for name, stream in STREAMS.items()}


class MeasurementError(RuntimeError):
    """A worker answered, but did other work than it was asked for."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        peers: the engines; the first is the reference.
        workloads: in this order.
        num_repetitions: that count; repetition 0 comes on top.
        timeout_s: most time for one job, and for a worker to start.
        quiet_wait_s: most time to wait before each measurement for others to leave the machine alone.
        deadline: begin nothing that would probably end later, in seconds of `time.monotonic`; None = there is none.
    """

    peers: tuple[Peer, ...]
    workloads: tuple[Workload, ...]
    num_repetitions: int
    timeout_s: float
    quiet_wait_s: float = 0.0
    deadline: float | None = None

    def has_time_for(self, seconds: float) -> bool:
        """True if something that takes so long would end before the deadline."""
        return self.deadline is None or time.monotonic() + seconds < self.deadline


def turns(plan: Plan) -> Iterator[tuple[int, Workload, Lane]]:
    """Who runs what, in order. The lane that starts moves on with each repetition, so that none is always first."""
    for repetition in range(plan.num_repetitions + 1):
        for workload in plan.workloads:
            lanes = [Lane(peer.name, variant) for peer in plan.peers for variant in peer.variants_of(workload.name)]
            shift = repetition % max(1, len(lanes))
            for lane in lanes[shift:] + lanes[:shift]:
                yield repetition, workload, lane


def shape_of(workload: Workload, repetition: int) -> Workload:
    """The workload as it is run in a repetition."""
    cut = WARM_UP_CUT.get(workload.name)
    return workload.cut(*cut) if repetition == WARM_UP and cut else workload


def check(job: Job, sample: Sample) -> None:
    """Refuse a sample of other work.

    Raises:
        MeasurementError: a request has another number of tokens than asked for, or a streamed job has no token times.
    """
    lengths = [len(output) for output in sample.outputs]
    if lengths != job.output_lens:
        wrong = sum(got != asked for got, asked in zip(lengths, job.output_lens, strict=False))
        raise MeasurementError(
            f"{len(lengths)} of {len(job.output_lens)} requests were answered, {wrong} of them with another number of "
            "tokens than asked for"
        )
    times = sample.token_times_s
    if job.stream and not (times and times == sorted(times) and times[-1] <= sample.wall_s):
        raise MeasurementError("the times of a streamed job are missing or out of order")


def facts_of(peer: Peer, loaded: Loaded, start_s: float) -> PeerFacts:
    """What the report says about an engine that is ready."""
    return PeerFacts(peer.about, loaded.versions, start_s, loaded.about, dict(peer.unsupported), peer.precision)


class Comparison:
    """Workers that were started, and what they measured so far.

    Args:
        start: starts the worker of a peer.
        settings: what to load, per peer.
        journal: gets what is found out; turns that it holds already are not taken again.
        say: gets a line after each measurement.
    """

    def __init__(
        self,
        plan: Plan,
        start: Callable[[Peer], WorkerProcess],
        settings: Callable[[Peer], dict[str, Any]],
        journal: Journal,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._plan = plan
        self._start = start
        self._settings = settings
        self._journal = journal
        self._say = say
        self._workers: dict[str, WorkerProcess] = {}

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def turns_left(self) -> list[tuple[int, Workload, Lane]]:
        """The turns of the plan that the journal does not hold, failed ones included there."""
        done = {(m.repetition, m.workload, m.lane) for m, _ in self._journal.measurements}
        return [turn for turn in turns(self._plan) if (turn[0], turn[1].name, turn[2]) not in done]

    def load(self) -> int:
        """Start every worker that has a turn left, one after the other. Returns the number of turns left.

        Raises:
            WorkerError, WorkerGoneError: one cannot start: then nothing can be compared.
        """
        left = self.turns_left()
        needed = {lane.peer for _, _, lane in left}
        for peer in self._plan.peers:
            if peer.name in needed:
                self._load(peer)
        return len(left)

    def _load(self, peer: Peer) -> None:
        self._say(f"starting {peer.name}")
        started = time.perf_counter()
        worker = self._workers[peer.name] = self._start(peer)
        with worker.awake():
            loaded = Loaded(**worker.ask("load", self._plan.timeout_s, settings=self._settings(peer)))
        start_s = time.perf_counter() - started
        self._say(f"  ready after {start_s:.1f} s")
        self._journal.add_peer(peer.name, facts_of(peer, loaded, start_s))

    def ceilings(self) -> None:
        """Measure what the machine reaches now, through every engine's library; workers that are gone are left out."""
        best = Ceilings()
        for worker in self._workers.values():
            try:
                with worker.awake():
                    best = best.merged(Ceilings(**worker.ask("ceilings", self._plan.timeout_s)))
            except (WorkerError, WorkerGoneError) as error:
                self._say(f"  ceilings: {error}")
        self._journal.add_ceilings(best)

    def measure(self) -> int:
        """Take the turns that are left, as long as there is time. A failure is a measurement with an `error`, never an
        exception.

        Returns: number of turns that are left.
        """
        left = self.turns_left()
        for taken, (repetition, workload, lane) in enumerate(left):
            if not self._has_time_for(workload.name, lane):
                self._say(f"the time is over: {len(left) - taken} turns are left")
                return len(left) - taken
            shape = shape_of(workload, repetition)
            job = Job(shape.prompts(repetition), list(shape.output_lens), lane.variant, shape.streamed)
            measurement, outputs = self._one(Measurement(workload.name, repetition, lane), job)
            self._say(_line(measurement))
            self._journal.add_measurement(measurement, outputs)
        return 0

    def _has_time_for(self, workload: str, lane: Lane) -> bool:
        """By the longest earlier turn of this lane; one of another length cannot be foreseen."""
        earlier = (m.wall_s or 0.0 for m, _ in self._journal.measurements if (m.workload, m.lane) == (workload, lane))
        return self._plan.has_time_for(max(earlier, default=0.0))

    def _one(self, blank: Measurement, job: Job) -> tuple[Measurement, Outputs | None]:
        wait_until_quiet(self._plan.quiet_wait_s)
        try:
            sample, foreign = self._ask(blank.lane.peer, job)
        except (WorkerError, WorkerGoneError, MeasurementError) as error:
            return replace(blank, error=f"{type(error).__name__}: {error}"), None
        measured = replace(
            blank,
            wall_s=sample.wall_s,
            token_times_s=sample.token_times_s,
            num_cached_tokens=sample.num_cached_tokens,
            foreign=foreign,
        )
        return measured, sample.outputs

    def _ask(self, name: str, job: Job) -> tuple[Sample, float | None]:
        """A checked sample, and the foreign CPU share meanwhile. A worker that is gone is started again first: one job
        too large for an engine must not void all later ones.
        """
        if self._workers[name].is_gone:
            self._load(next(peer for peer in self._plan.peers if peer.name == name))
        worker = self._workers[name]
        with worker.awake():
            audit = Audit(worker.group)
            sample = Sample(**worker.ask("run", self._plan.timeout_s, job=dataclasses.asdict(job)))
            foreign = audit.foreign()
        check(job, sample)
        return sample, foreign


def with_agreement(journal: Journal, reference: str) -> list[Measurement]:
    """All measurements, each lane's tokens compared with the reference's of the same workload and repetition."""
    ours = {(m.workload, m.repetition): outputs for m, outputs in journal.measurements if m.lane.peer == reference}
    compared = []
    for m, theirs in journal.measurements:
        same = ours.get((m.workload, m.repetition))
        if same is not None and theirs is not None and m.lane.peer != reference:
            m = replace(m, agreement=agreement(same, theirs))
        compared.append(m)
    return compared


def _line(m: Measurement) -> str:
    what = f"{m.workload} repetition {m.repetition}{' (warm-up)' if m.repetition == WARM_UP else ''}, {m.lane}"
    if m.error is not None:
        return f"{what}: FAILED: {m.error}"
    foreign = "" if m.foreign is None else f", others used {100 * m.foreign:.0f} % of the machine"
    return f"{what}: {m.wall_s:.2f} s{foreign}"
