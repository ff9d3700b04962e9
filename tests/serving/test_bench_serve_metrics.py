"""The figures of `quire bench serve` from recorded times, against values worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from serving.bench.serve_metrics import RequestTrace, concurrency, metrics, tokens_per_bucket
from serving.bench.serve_requests import (
    PrefixRepetition,
    RandomLengths,
    ShareGpt,
    arrival_times,
    ids_prompt,
    text_prompt,
)

# Three chunks of a token each; two chunks of two tokens each; one token; a failure.
TRACES = [
    RequestTrace(0.0, (0.1, 0.2, 0.4), num_prompt_tokens=10, num_output_tokens=3),
    RequestTrace(0.5, (1.0, 1.6), num_prompt_tokens=20, num_output_tokens=4),
    RequestTrace(1.6, (1.9,), num_prompt_tokens=30, num_output_tokens=1),
    RequestTrace(0.0, (0.1, 0.3), error="cut"),
]


def test_every_figure_of_a_recorded_run() -> None:
    found = metrics(TRACES, 2.0, percents=(50, 99), goodput_ms={"ttft": 400, "tpot": 160})
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (60, 8)
    assert found["request_throughput"] == 1.5
    assert found["output_throughput"] == 4.0 and found["total_token_throughput"] == 34.0
    # TTFTs 100, 500, 300 ms
    assert found["mean_ttft_ms"] == pytest.approx(300) and found["median_ttft_ms"] == pytest.approx(300)
    assert found["std_ttft_ms"] == pytest.approx(math.sqrt((200**2 + 200**2) / 3))
    assert found["p99_ttft_ms"] == pytest.approx(300 + 0.98 * 200)
    # TPOTs 300/2 and 600/3 ms; the single token has none
    assert found["mean_tpot_ms"] == pytest.approx(175) and found["p50_tpot_ms"] == pytest.approx(175)
    # ITLs by chunk: 100, 200, 600 ms
    assert found["mean_itl_ms"] == pytest.approx(300) and found["median_itl_ms"] == pytest.approx(200)
    # E2ELs 400, 1100, 300 ms
    assert found["mean_e2el_ms"] == pytest.approx(600) and found["median_e2el_ms"] == pytest.approx(400)
    # good: the first (100, 150) and the third (300, none)
    assert found["request_goodput"] == 1.0
    # second 0 has 3 tokens, second 1 has 2 + 2 + 1
    assert found["max_output_tokens_per_s"] == 5.0
    assert found["max_concurrent_requests"] == 1


def test_one_that_ends_as_another_is_sent_does_not_run_beside_it() -> None:
    assert concurrency(TRACES[1:3]) == [(0.5, 1), (1.6, 0), (1.6, 1), (1.9, 0)]
    beside = [RequestTrace(0.0, (2.0,)), RequestTrace(1.0, (3.0,)), RequestTrace(1.5, (1.75,))]
    assert max(running for _, running in concurrency(beside)) == 3


def test_merged_tokens_count_in_the_peak() -> None:
    trace = RequestTrace(5.0, (5.5, 6.5), num_output_tokens=10)
    assert tokens_per_bucket([trace]) == [5.0, 5.0]


def test_nothing_done_gives_no_latencies() -> None:
    found = metrics([RequestTrace(0.0, error="refused")], 1.0)
    assert found["failed"] == 1 and found["output_throughput"] == 0 and found["mean_ttft_ms"] is None
    assert found["max_output_tokens_per_s"] == 0 and found["request_goodput"] is None


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 5.0, math.inf])
def test_arrivals_rise_to_the_rate_and_are_as_bursty_as_asked(burstiness: float) -> None:
    times = arrival_times(4000, 20.0, burstiness, "seed")
    assert times[-1] == pytest.approx(200.0) and times == sorted(times)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    variation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean
    assert variation == pytest.approx(0.0 if math.isinf(burstiness) else 1 / math.sqrt(burstiness), rel=0.1, abs=1e-6)
    assert times == arrival_times(4000, 20.0, burstiness, "seed")
    if not math.isinf(burstiness):
        assert times != arrival_times(4000, 20.0, burstiness, "other seed")


def test_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, "s") == [0.0, 0.0, 0.0]


def test_lengths_as_in_sharegpt() -> None:
    requests = ShareGpt().requests(4000, "seed", ids_prompt(1000, 100))
    prompts = [len(request.prompt) for request in requests]
    outputs = [request.output_len for request in requests]
    assert 200 < sum(prompts) / 4000 < 240 and 165 < sum(outputs) / 4000 < 195
    assert min(prompts) >= 4 and max(prompts) <= 1024 and max(outputs) <= 1024
    assert all(100 <= token < 1000 for request in requests for token in request.prompt if isinstance(token, int))
    assert requests[:50] == ShareGpt().requests(50, "seed", ids_prompt(1000, 100))


def test_random_lengths_stay_in_their_range() -> None:
    requests = RandomLengths(100, 50, 0.2).requests(500, "seed", text_prompt)
    prompts = {len(str(request.prompt).split()) for request in requests}
    assert (min(prompts), max(prompts)) == (80, 120)
    assert {request.output_len for request in requests} == set(range(40, 61))
    assert len({str(request.prompt) for request in requests}) == 500, "no prefix cache can help"
    assert {r.output_len for r in RandomLengths(8, 1, 0.0).requests(5, "s", text_prompt)} == {1}


def test_prefixes_repeat() -> None:
    requests = PrefixRepetition(16, 8, 4, 2).requests(40, "seed", ids_prompt(50_000, 0))
    prefixes = [tuple(request.prompt[:16]) for request in requests]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [10, 10, 10, 10]
    assert len({tuple(request.prompt[16:]) for request in requests}) == 40
    assert prefixes != sorted(prefixes, key=prefixes.index), "shuffled"
    text = PrefixRepetition(3, 2, 1, 2).requests(2, "seed", text_prompt)
    assert len(str(text[0].prompt).split()) == 5


def test_text_prompts_are_words() -> None:
    assert len(text_prompt(random.Random(0), 7).split()) == 7
