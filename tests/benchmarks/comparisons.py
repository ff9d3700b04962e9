"""Made-up results for the tests of figures, report and plots."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.ceilings import Ceilings
from benchmarks.compare.peer import Precision
from benchmarks.compare.results import Lane, Measurement, PeerFacts, Results, RunInfo, Start
from benchmarks.roofline import ModelCosts
from benchmarks.workloads.cpu_smollm2 import ALL as EVERY

QUIRE, ALL, SORTED = Lane("quire"), Lane("peer", "batch-all"), Lane("peer", "batch-16-sorted")
COSTS = ModelCosts(1000, 100, 10, 4, 2)


def streamed(lane: Lane, repetition: int, ttft_s: float, gap_s: float) -> Measurement:
    """W1 with equal gaps."""
    times = [ttft_s + gap_s * i for i in range(128)]
    return Measurement("w1", repetition, lane, times[-1], times, 0, None, 0.02)


def batch(lane: Lane, repetition: int, wall_s: float, workload: str = "w2", foreign: float = 0.02) -> Measurement:
    """Another workload."""
    agreement = None if lane == QUIRE else 0.75
    return Measurement(workload, repetition, lane, wall_s, [], 480, agreement, foreign)


def results(measurements: list[Measurement], *, cut: bool = False) -> Results:
    """With two engines, and ceilings that make round numbers."""
    machine = {"processor": "Abacus", "cpu_count": 2, "platform": "Linux", "versions": {}}
    names = list(dict.fromkeys(m.workload for m in measurements))
    return Results(
        run=RunInfo("2026-01-02 03:04 UTC", "abc123", "python -m benchmarks.compare", machine, "bfloat16", 2, cut),
        workloads={name: EVERY[name] for name in names},
        peers={
            "quire": PeerFacts("Quire", {"jax": "0.11.2"}, 12.0, {}),
            "peer": PeerFacts(
                "a peer", {"torch": "2.13.0"}, 6.0, {}, {"w4": "it has no cache", "w3": "it has no cache"}
            ),
        },
        ceilings=Ceilings({"numpy": 1e6}, {"numpy bfloat16": 1e9}),
        costs=COSTS,
        measurements=measurements,
    )


def example(*, cut: bool = False) -> Results:
    """All four workloads; the warm-up is absurd, so that counting it would show; one failure, one disturbed."""
    measured = [streamed(QUIRE, 0, 50.0, 50.0), batch(ALL, 0, 9999.0)]
    for repetition, wall in ((1, 10.0), (2, 20.0)):
        measured += [
            streamed(QUIRE, repetition, 0.1, 0.01),
            streamed(Lane("peer"), repetition, 0.2, 0.03),
            batch(QUIRE, repetition, wall),
            batch(ALL, repetition, 5 * wall, foreign=0.5 if repetition == 2 else 0.0),
            batch(SORTED, repetition, 3 * wall),
            batch(QUIRE, repetition, 1.0, "w3"),
            batch(Lane("peer"), repetition, 4.0, "w3"),
            batch(QUIRE, repetition, 2.0, "w4"),
        ]
    measured += [
        batch(Lane("peer"), 1, 8.0, "w4"),
        Measurement("w4", 2, Lane("peer"), error="WorkerError: out of memory"),
    ]
    return results(measured, cut=cut)


def example_of_streams() -> Results:
    """Two numbers of streams, one failure, starts, and a peer whose weights take a quarter of the bytes."""
    found = results(
        [
            *(batch(QUIRE, repetition, 0.5, "s1") for repetition in (1, 2)),
            *(batch(QUIRE, repetition, 1.0, "s8") for repetition in (1, 2)),
            *(batch(ALL, repetition, 2.0, "s8") for repetition in (1, 2)),
            *(batch(SORTED, repetition, 4.0, "s8") for repetition in (1, 2)),
            Measurement("s1", 1, Lane("peer"), error="WorkerError: out of memory"),
            streamed(Lane("peer"), 1, 0.1, 0.01),
            batch(Lane("peer"), 1, 1.0, "w3"),
        ]
    )
    found.peers["peer"] = replace(found.peers["peer"], precision=Precision(0.5, 1.0, multiplies_int8=True))
    found.starts.extend([Start("quire", 1, True, 40.0, 0.0), Start("quire", 1, False, 10.0, 0.5)])
    found.starts.append(Start("peer", 1, True, error="WorkerGoneError: the worker ended"))
    return found
