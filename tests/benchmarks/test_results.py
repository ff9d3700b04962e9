"""Figures from measurements, each against a number worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.ceilings import Ceilings
from benchmarks.compare.results import (
    Lane,
    Results,
    Summary,
    agreement,
    best_lane,
    gaps_ms,
    metrics_of,
    ratios,
    roofline_percent,
)
from benchmarks.roofline import workload_flops
from benchmarks.workloads.cpu_smollm2 import WORKLOADS
from tests.benchmarks.comparisons import (
    ALL,
    COSTS,
    QUIRE,
    SORTED,
    batch,
    example,
    example_of_streams,
    results,
    streamed,
)


def _value(workload: str, metric: str, measurement: object) -> float | None:
    found = next(m for m in metrics_of(workload) if m.name == metric)
    return found.of(WORKLOADS[workload], measurement)  # type: ignore[arg-type]


def test_w1_figures() -> None:
    measured = streamed(QUIRE, 1, ttft_s=0.25, gap_s=0.02)
    assert _value("w1", "TTFT ms", measured) == pytest.approx(250)
    assert _value("w1", "decode tok/s", measured) == pytest.approx(50)
    assert _value("w1", "ITL p50 ms", measured) == pytest.approx(20)
    assert _value("w1", "ITL p99 ms", measured) == pytest.approx(20)


def test_a_stall_shows_in_p99_and_not_in_p50() -> None:
    measured = streamed(QUIRE, 1, 0.1, 0.01)
    late = [t if i < 64 else t + 1.0 for i, t in enumerate(measured.token_times_s)]
    stalled = streamed(QUIRE, 1, 0.1, 0.01)
    stalled.token_times_s[:] = late
    assert max(gaps_ms([stalled])) == pytest.approx(1010)
    assert _value("w1", "ITL p50 ms", stalled) == pytest.approx(10)


def test_throughputs() -> None:
    assert _value("w2", "output tok/s", batch(QUIRE, 1, 11.519)) == pytest.approx(1000)
    assert _value("w2", "total tok/s", batch(QUIRE, 1, 25.599)) == pytest.approx(1000)
    assert _value("w3", "prompt tok/s", batch(QUIRE, 1, 2.0, "w3")) == pytest.approx(1024)
    assert _value("w4", "wall s", batch(QUIRE, 1, 3.5, "w4")) == 3.5


def test_warm_up_and_failures_do_not_count() -> None:
    found = example()
    assert [m.repetition for m in found.counted("w1", QUIRE)] == [1, 2]
    assert [m.repetition for m in found.counted("w4", Lane("peer"))] == [1]
    assert found.failures("w4", Lane("peer")) == 1 and found.failures("w2", ALL) == 0


def test_summary_is_median_and_spread() -> None:
    assert Summary.of([3.0, None, 1.0, 2.0]) == Summary(2.0, 1.0, 3.0, 3)
    assert Summary.of([None]) is None


def test_the_best_variant_of_a_peer_is_the_one_with_the_best_median() -> None:
    found = example()
    assert best_lane(found, "w2", "peer") == SORTED
    assert best_lane(results([batch(ALL, 0, 1.0)]), "w2", "peer") is None  # only a warm-up


def test_ratios_point_the_same_way_for_times_and_rates() -> None:
    found = {(r.metric.name, str(r.lane)): r for r in ratios(example(), "w2", "quire")}
    assert set(lane for _, lane in found) == {"peer (batch-16-sorted)"}
    for name in ("output tok/s", "total tok/s", "wall s"):
        ratio = found[name, "peer (batch-16-sorted)"]
        assert ratio.of_medians == pytest.approx(3.0)
        assert ratio.of_pairs is not None and ratio.of_pairs.median == pytest.approx(3.0)


def test_pairs_are_of_the_same_repetition() -> None:
    found = results([batch(QUIRE, 1, 1.0), batch(QUIRE, 2, 10.0), batch(ALL, 1, 4.0), batch(ALL, 2, 20.0)])
    ratio = ratios(found, "w2", "quire")[0]
    assert ratio.of_pairs == Summary(3.0, 2.0, 4.0, 2)
    # Medians of the rates: 11519 * mean(1, 1/10) against 11519 * mean(1/4, 1/20).
    assert ratio.of_medians == pytest.approx(0.55 / 0.15)


def test_a_repetition_that_one_side_failed_is_in_no_pair() -> None:
    ratio = ratios(example(), "w4", "quire")[0]
    assert ratio.of_pairs is not None and (ratio.of_pairs.count, ratio.of_medians) == (1, 4.0)


def test_roofline_percent() -> None:
    found = example()
    floor = COSTS.decode_bytes(128 + 129 / 2) / 1e6
    assert roofline_percent(found, "w1", QUIRE) == pytest.approx(100 * floor / 0.01)
    flops = workload_flops(COSTS, WORKLOADS["w3"])
    assert roofline_percent(found, "w3", QUIRE) == pytest.approx(100 * flops / 1e9 / 1.0)
    assert roofline_percent(found, "w4", QUIRE) is None


def test_fewer_bytes_and_faster_products_are_another_floor() -> None:
    found = example_of_streams()
    body, head, kv = 1000 * 0.5, 100 * 1.0, 10 * (128 + 129 / 2) * 2
    assert roofline_percent(found, "w1", Lane("peer")) == pytest.approx(100 * (body + head + kv) / 1e6 / 0.01)
    flops = workload_flops(COSTS, WORKLOADS["w3"])
    assert roofline_percent(found, "w3", Lane("peer")) == pytest.approx(100 * flops / 1e9)  # no int8 rate is known
    faster = replace(found, ceilings=Ceilings({"numpy": 1e6}, {"numpy bfloat16": 1e9, "torch int8": 4e9}))
    assert roofline_percent(faster, "w3", Lane("peer")) == pytest.approx(100 * flops / 4e9)


@pytest.mark.parametrize("make", [example, example_of_streams])
def test_results_survive_json(make: Callable[[], Results]) -> None:
    found = make()
    assert Results.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_agreement_is_up_to_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx((0.5 + 1.0) / 2)
    assert agreement([[1]], [[2]]) == 0.0
