"""Starts the workers, then asks one after the other: repetition by repetition, workload by workload, lane by lane."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.compare.audit import Audit, wait_until_quiet
from benchmarks.compare.peer import Peer
from benchmarks.compare.process import WorkerError, WorkerGoneError, WorkerProcess
from benchmarks.compare.protocol import Job, Loaded, Sample
from benchmarks.compare.results import WARM_UP, Lane, Measurement, PeerFacts, agreement
from benchmarks.workloads.cpu_smollm2 import Workload

WARM_UP_CUT = {"w2": (8, 16)}  # (requests, most output tokens): a whole warm-up of W2 would take minutes per lane


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
    """

    peers: tuple[Peer, ...]
    workloads: tuple[Workload, ...]
    num_repetitions: int
    timeout_s: float
    quiet_wait_s: float = 0.0


def turns(plan: Plan) -> Iterator[tuple[int, Workload, Lane]]:
    """Who runs what, in order. The lane that starts moves on with each repetition, so that none is always first."""
    for repetition in range(plan.num_repetitions + 1):
        for workload in plan.workloads:
            lanes = [Lane(peer.name, variant) for peer in plan.peers for variant in peer.variants_of(workload.name)]
            shift = repetition % len(lanes)
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


class Comparison:
    """Workers that were started, and what they measured so far.

    Args:
        start: starts the worker of a peer.
        settings: what to load, per peer.
        say: gets a line after each measurement.
    """

    def __init__(
        self,
        plan: Plan,
        start: Callable[[Peer], WorkerProcess],
        settings: Callable[[Peer], dict[str, Any]],
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._plan = plan
        self._start = start
        self._settings = settings
        self._say = say
        self._workers: dict[str, WorkerProcess] = {}
        self._outputs: dict[tuple[str, int, Lane], list[list[int]]] = {}

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def load(self) -> dict[str, PeerFacts]:
        """Start every worker, one after the other.

        Raises:
            WorkerError, WorkerGoneError: one cannot start: then nothing can be compared.
        """
        return {peer.name: self._load(peer) for peer in self._plan.peers}

    def _load(self, peer: Peer) -> PeerFacts:
        self._say(f"starting {peer.name}")
        started = time.perf_counter()
        worker = self._workers[peer.name] = self._start(peer)
        with worker.awake():
            loaded = Loaded(**worker.ask("load", self._plan.timeout_s, settings=self._settings(peer)))
        start_s = time.perf_counter() - started
        self._say(f"  ready after {start_s:.1f} s")
        return PeerFacts(peer.about, loaded.versions, start_s, loaded.about)

    def ceilings(self) -> Ceilings:
        """What the machine reaches now, through every engine's library; workers that are gone are left out."""
        best = Ceilings()
        for worker in self._workers.values():
            try:
                with worker.awake():
                    best = best.merged(Ceilings(**worker.ask("ceilings", self._plan.timeout_s)))
            except (WorkerError, WorkerGoneError) as error:
                self._say(f"  ceilings: {error}")
        return best

    def measure(self) -> list[Measurement]:
        """All turns. A failure is a measurement with an `error`, never an exception."""
        measured = []
        for repetition, workload, lane in turns(self._plan):
            shape = shape_of(workload, repetition)
            job = Job(shape.prompts(repetition), list(shape.output_lens), lane.variant, shape.streamed)
            measurement = self._one(Measurement(workload.name, repetition, lane), job)
            self._say(_line(measurement))
            measured.append(measurement)
        return self._with_agreement(measured)

    def _one(self, blank: Measurement, job: Job) -> Measurement:
        wait_until_quiet(self._plan.quiet_wait_s)
        try:
            sample, foreign = self._ask(blank.lane.peer, job)
        except (WorkerError, WorkerGoneError, MeasurementError) as error:
            return replace(blank, error=f"{type(error).__name__}: {error}")
        self._outputs[blank.workload, blank.repetition, blank.lane] = sample.outputs
        return replace(
            blank,
            wall_s=sample.wall_s,
            token_times_s=sample.token_times_s,
            num_cached_tokens=sample.num_cached_tokens,
            foreign=foreign,
        )

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

    def _with_agreement(self, measured: Sequence[Measurement]) -> list[Measurement]:
        """Compare every lane's tokens with the reference's of the same repetition."""
        reference = self._plan.peers[0]
        compared = []
        for m in measured:
            ours = self._outputs.get((m.workload, m.repetition, _reference_lane(reference, m.workload)))
            theirs = self._outputs.get((m.workload, m.repetition, m.lane))
            if ours is not None and theirs is not None and m.lane.peer != reference.name:
                m = replace(m, agreement=agreement(ours, theirs))
            compared.append(m)
        return compared


def _reference_lane(reference: Peer, workload: str) -> Lane:
    return Lane(reference.name, reference.variants_of(workload)[0])


def _line(m: Measurement) -> str:
    what = f"{m.workload} repetition {m.repetition}{' (warm-up)' if m.repetition == WARM_UP else ''}, {m.lane}"
    if m.error is not None:
        return f"{what}: FAILED: {m.error}"
    foreign = "" if m.foreign is None else f", others used {100 * m.foreign:.0f} % of the machine"
    return f"{what}: {m.wall_s:.2f} s{foreign}"
