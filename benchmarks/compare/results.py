"""What a comparison measured, and the figures made from it. Pure values: read from JSON, they give the same report.

Definitions as in `vllm bench serve`. TTFT: requests handed over until the first token is handed out. ITL: every gap
between two consecutive outputs, pooled. Decode rate: tokens after the first, per second between first and last.
Throughput: tokens over the time from hand-over to the last completion.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.compare.peer import Precision
from benchmarks.roofline import ModelCosts, compute_floor_s, decode_floor_s
from benchmarks.workloads.cpu_smollm2 import STREAMS, Workload
from serving.timing import percentile

WARM_UP = 0  # the repetition that does not count


@dataclass(frozen=True)
class Lane:
    """One engine, run in one of its ways."""

    peer: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.peer} ({self.variant})" if self.variant else self.peer


@dataclass(frozen=True)
class Measurement:
    """One repetition of one workload in one lane.

    Attributes:
        workload, repetition, lane: what was run.
        wall_s, token_times_s, num_cached_tokens: see `protocol.Sample`; empty if it failed.
        agreement: mean fraction of each request's tokens that are the reference engine's, up to the first difference;
            None for the reference itself and where it failed.
        foreign: fraction of all cores' time that others used meanwhile; None if unknown.
        error: why it failed; None if it did not.
    """

    workload: str
    repetition: int
    lane: Lane
    wall_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    num_cached_tokens: int | None = None
    agreement: float | None = None
    foreign: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class PeerFacts:
    """What a worker said when it was ready.

    Attributes:
        about, unsupported, precision: see `peer.Peer`.
        versions, details: see `protocol.Loaded`.
        start_s: from the start of its process to that, with caches as found.
    """

    about: str
    versions: dict[str, str]
    start_s: float
    details: dict[str, Any]
    unsupported: dict[str, str] = field(default_factory=dict)
    precision: Precision = Precision()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PeerFacts:
        """The inverse of `asdict`."""
        return cls(**{**content, "precision": Precision(**content.get("precision", {}))})


@dataclass(frozen=True)
class Start:
    """One timed start of an engine: from the start of its process to the first token of a trivial request.

    Attributes:
        peer, repetition: of what.
        is_cold: there was no compiled code in its caches; else it was left by a start before.
        seconds: None if it failed.
        foreign: see `Measurement`.
        error: why it failed; None if it did not.
    """

    peer: str
    repetition: int
    is_cold: bool
    seconds: float | None = None
    foreign: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class RunInfo:
    """When, where and how. `cut`: workloads were made smaller, so the figures are no measurement."""

    date: str
    commit: str
    command: str
    machine: dict[str, Any]
    dtype: str
    num_repetitions: int
    cut: bool


@dataclass(frozen=True)
class Results:
    """Everything that a comparison found out."""

    run: RunInfo
    workloads: dict[str, Workload]
    peers: dict[str, PeerFacts]
    ceilings: Ceilings
    costs: ModelCosts
    measurements: list[Measurement]
    starts: list[Start] = field(default_factory=list)

    def lanes(self, workload: str) -> list[Lane]:
        """All lanes of a workload, in the order in which they were first measured."""
        return list(dict.fromkeys(m.lane for m in self.measurements if m.workload == workload))

    def counted(self, workload: str, lane: Lane) -> list[Measurement]:
        """The measurements that count: no warm-up, no failures."""
        return [
            m
            for m in self.measurements
            if (m.workload, m.lane) == (workload, lane) and m.repetition != WARM_UP and m.error is None
        ]

    def failures(self, workload: str, lane: Lane) -> int:
        """Failed repetitions, the warm-up included."""
        return sum((m.workload, m.lane) == (workload, lane) and m.error is not None for m in self.measurements)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """The inverse of `as_json`."""
        return cls(
            run=RunInfo(**content["run"]),
            workloads={name: _workload(value) for name, value in content["workloads"].items()},
            peers={name: PeerFacts.from_json(value) for name, value in content["peers"].items()},
            ceilings=Ceilings(**content["ceilings"]),
            costs=ModelCosts(**content["costs"]),
            measurements=[Measurement(**m | {"lane": Lane(**m["lane"])}) for m in content["measurements"]],
            starts=[Start(**start) for start in content.get("starts", [])],
        )


def _workload(content: Mapping[str, Any]) -> Workload:
    lengths = {name: tuple(content[name]) for name in ("prompt_lens", "output_lens")}
    return Workload(**{**content, **lengths})


@dataclass(frozen=True)
class Summary:
    """Median and spread of some values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Summary | None:
        """None if there is no value."""
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Metric:
    """One figure of a workload.

    Attributes:
        name: with its unit, for tables.
        digits: after the decimal point.
        higher_is_better: decides which way a ratio points.
        of: from one measurement of a workload; None where it does not apply.
    """

    name: str
    digits: int
    higher_is_better: bool
    of: Callable[[Workload, Measurement], float | None]

    def summary(self, workload: Workload, measurements: Iterable[Measurement]) -> Summary | None:
        """Over repetitions."""
        return Summary.of(self.of(workload, measurement) for measurement in measurements)

    def advantage(self, ours: float, theirs: float) -> float:
        """How many times better `ours` is than `theirs`."""
        return ours / theirs if self.higher_is_better else theirs / ours


def _rate(count: Callable[[Workload], int]) -> Callable[[Workload, Measurement], float | None]:
    return lambda workload, m: count(workload) / m.wall_s if m.wall_s else None


def _ttft_ms(_: Workload, m: Measurement) -> float | None:
    return m.token_times_s[0] * 1e3 if m.token_times_s else None


def _decode_rate(workload: Workload, m: Measurement) -> float | None:
    times = m.token_times_s
    return (workload.num_output_tokens - 1) / (times[-1] - times[0]) if len(times) > 1 else None


def gaps_ms(measurements: Iterable[Measurement]) -> list[float]:
    """Times between consecutive outputs, pooled over repetitions."""
    return [
        (later - earlier) * 1e3
        for m in measurements
        for earlier, later in zip(m.token_times_s, m.token_times_s[1:], strict=False)
    ]


def _gap(percent: float) -> Callable[[Workload, Measurement], float | None]:
    def value(_: Workload, m: Measurement) -> float | None:
        gaps = gaps_ms([m])
        return percentile(gaps, percent) if gaps else None

    return value


_WALL = Metric("wall s", 2, False, lambda _, m: m.wall_s)
_OUTPUT_RATE = Metric("output tok/s", 1, True, _rate(lambda w: w.num_output_tokens))
_TOTAL_RATE = Metric("total tok/s", 1, True, _rate(lambda w: w.num_prompt_tokens + w.num_output_tokens))

# The first of each workload decides which variant of a peer is its best.
_METRICS: dict[str, tuple[Metric, ...]] = {
    "w1": (
        Metric("decode tok/s", 1, True, _decode_rate),
        Metric("TTFT ms", 1, False, _ttft_ms),
        Metric("ITL p50 ms", 2, False, _gap(50)),
        Metric("ITL p99 ms", 2, False, _gap(99)),
    ),
    "w2": (_OUTPUT_RATE, _TOTAL_RATE, _WALL),
    "w3": (Metric("prompt tok/s", 1, True, _rate(lambda w: w.num_prompt_tokens)), _WALL),
    "w4": (_WALL, _OUTPUT_RATE),
}


def metrics_of(workload: str) -> tuple[Metric, ...]:
    """The figures of a workload; streams have the same at every number of them."""
    return (_OUTPUT_RATE, _WALL) if workload in STREAMS else _METRICS[workload]


@dataclass(frozen=True)
class Ratio:
    """How many times better the reference is than another lane, in one metric.

    Attributes:
        metric, lane: of what, to whom.
        of_medians: median of the reference and median of the lane.
        of_pairs: the two of each repetition, summarised.
    """

    metric: Metric
    lane: Lane
    of_medians: float
    of_pairs: Summary | None


def best_lane(results: Results, workload: str, peer: str) -> Lane | None:
    """The way in which a peer runs a workload best, by the workload's first metric; None if all failed."""
    metric = metrics_of(workload)[0]
    medians: list[tuple[float, Lane]] = []
    for lane in results.lanes(workload):
        summary = metric.summary(results.workloads[workload], results.counted(workload, lane))
        if lane.peer == peer and summary is not None:
            medians.append((summary.median, lane))
    choose = max if metric.higher_is_better else min
    return choose(medians, key=lambda pair: pair[0])[1] if medians else None


def ratios(results: Results, workload: str, reference: str) -> list[Ratio]:
    """The reference against the best lane of each other peer, in every metric of a workload."""
    ours = best_lane(results, workload, reference)
    if ours is None:
        return []
    found = []
    for peer in results.peers:
        theirs = None if peer == reference else best_lane(results, workload, peer)
        if theirs is None:
            continue
        for metric in metrics_of(workload):
            ratio = _ratio(metric, results.workloads[workload], theirs, _by_repetition(results, workload, ours, theirs))
            if ratio is not None:
                found.append(ratio)
    return found


def _by_repetition(
    results: Results, workload: str, ours: Lane, theirs: Lane
) -> Sequence[tuple[Measurement, Measurement]]:
    """Both lanes' measurements of those repetitions that both completed."""
    other = {m.repetition: m for m in results.counted(workload, theirs)}
    return [(m, other[m.repetition]) for m in results.counted(workload, ours) if m.repetition in other]


def _ratio(
    metric: Metric, workload: Workload, lane: Lane, pairs: Sequence[tuple[Measurement, Measurement]]
) -> Ratio | None:
    values = [(metric.of(workload, ours), metric.of(workload, theirs)) for ours, theirs in pairs]
    known = [(ours, theirs) for ours, theirs in values if ours is not None and theirs is not None]
    if not known:
        return None
    ours, theirs = (statistics.median(side) for side in zip(*known, strict=True))
    return Ratio(metric, lane, metric.advantage(ours, theirs), Summary.of(metric.advantage(o, t) for o, t in known))


def roofline_percent(results: Results, workload: str, lane: Lane) -> float | None:
    """Floor over measured, in %: bytes for w1 (per output token), operations for w2 and w3; else None.

    W4 has none: what an engine must compute there depends on what it shares.
    """
    shape, measured = results.workloads[workload], results.counted(workload, lane)
    facts = results.peers.get(lane.peer)
    precision = Precision() if facts is None else facts.precision
    if workload == "w1":
        costs = results.costs.with_weights(precision.body_bytes, precision.head_bytes)
        floor = decode_floor_s(costs, shape, results.ceilings)
        rate = _METRICS["w1"][0].summary(shape, measured)
        return None if floor is None or rate is None else 100 * floor * rate.median
    if workload in ("w2", "w3"):
        floor = _compute_floor(results, shape, precision)
        wall = _WALL.summary(shape, measured)
        return None if floor is None or wall is None else 100 * floor / wall.median
    return None


def _compute_floor(results: Results, shape: Workload, precision: Precision) -> float | None:
    """Seconds. For 8-bit products the better of both rates: a library that is slow with them is no limit."""
    dtypes = (results.run.dtype, *(("int8",) if precision.multiplies_int8 else ()))
    floors = (compute_floor_s(results.costs, shape, results.ceilings, dtype) for dtype in dtypes)
    return min((floor for floor in floors if floor is not None), default=None)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Mean over requests of the fraction of tokens that are equal before the first difference."""
    fractions = []
    for first, second in zip(ours, theirs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))
        fractions.append(same / len(first))
    return statistics.fmean(fractions)
