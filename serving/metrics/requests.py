"""`RequestMetrics`: the observer that feeds the histograms of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, Metric

from engine.outputs import RequestMetrics as EngineTimes
from engine.sampling_params import RequestOutputKind
from serving.http.observer import RequestEnd, RequestStart
from serving.metrics.histograms import (
    COMPLETIONS,
    FIRST_TOKEN_S,
    PER_TOKEN_S,
    PREEMPTIONS,
    REQUEST_S,
    Histogram,
    token_bounds,
)

ANSWERED = 200


@dataclass(slots=True)
class _Live:
    """A request that has not ended.

    Attributes:
        completions: its n.
        last: time of its newest token; None before the first.
    """

    start: RequestStart
    completions: int
    last: float | None = None

    @property
    def streams(self) -> bool:
        """True if its tokens are seen as they come."""
        params = self.start.params
        return params is not None and params.output_kind is not RequestOutputKind.FINAL_ONLY


class RequestMetrics:
    """Feeds histograms. Everything happens in the event loop.

    Only requests that were answered count in the histograms of whole requests: the times and lengths of one that
    failed, or whose client left, are not those of an answer (`vllm:request_success_total` has them, by reason).
    """

    def __init__(self, max_model_len: int) -> None:
        tokens = token_bounds(max_model_len)
        self._live: dict[str, _Live] = {}
        self._rejected: Counter[str] = Counter()
        self._all: list[Histogram] = []

        def make(name: str, help: str, bounds: tuple[float, ...]) -> Histogram:
            histogram = Histogram(f"vllm:{name}", help, bounds)
            self._all.append(histogram)
            return histogram

        self._first_token = make("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_S)
        self._between = make("inter_token_latency_seconds", "Between two tokens of a completion.", PER_TOKEN_S)
        self._per_token = make(
            "request_time_per_output_token_seconds", "Mean time per token after the first, per request.", PER_TOKEN_S
        )
        self._e2e = make("e2e_request_latency_seconds", "From arrival to the end.", REQUEST_S)
        self._queue = make("request_queue_time_seconds", "From arrival to the first step.", REQUEST_S)
        self._prefill = make("request_prefill_time_seconds", "From the first step to the first token.", REQUEST_S)
        self._decode = make("request_decode_time_seconds", "From the first token to the last.", REQUEST_S)
        self._inference = make("request_inference_time_seconds", "From the first step to the last token.", REQUEST_S)
        self._prompt = make("request_prompt_tokens", "Tokens of the prompt.", tokens)
        self._computed = make("request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", tokens)
        self._generated = make("request_generation_tokens", "Tokens of all completions.", tokens)
        self._longest = make("request_max_num_generation_tokens", "Tokens of the completion, where n is 1.", tokens)
        self._n = make("request_params_n", "The parameter n.", COMPLETIONS)
        self._max_tokens = make("request_params_max_tokens", "The parameter max_tokens, where given.", tokens)
        self._preemptions = make("request_num_preemptions", "How often a request lost its blocks.", PREEMPTIONS)

    def on_start(self, start: RequestStart) -> None:
        """A request was accepted."""
        self._live[start.request_id] = _Live(start, 1 if start.params is None else start.params.n)

    def on_tokens(self, request_id: str, num_tokens: int, time: float) -> None:
        """New tokens: the first is a time to first token, the others are gaps.

        An output with several tokens per completion (merged, because the client is slow) counts as so many equal gaps.
        """
        live = self._live.get(request_id)
        if live is None or not live.streams:
            return
        last, live.last = live.last, time
        if last is None:
            self._first_token.observe(time - live.start.time)
        elif live.completions == 1:
            self._between.observe((time - last) / num_tokens, num_tokens)
        else:  # each completion got about so many in the same time
            self._between.observe((time - last) * min(live.completions, num_tokens) / num_tokens, num_tokens)

    def on_end(self, end: RequestEnd) -> None:
        """A request ended."""
        live = self._live.pop(end.request_id, None)
        output = end.output
        if live is None or output is None or end.status != ANSWERED:
            return
        start = live.start
        self._e2e.observe(end.e2e_s)
        self._prompt.observe(start.num_prompt_tokens)
        self._computed.observe(start.num_prompt_tokens - output.num_cached_tokens)
        if start.params is not None:
            self._generated.observe(end.num_output_tokens)
            if live.completions == 1:  # of several, only the sum is known
                self._longest.observe(end.num_output_tokens)
            self._n.observe(start.params.n)
            if start.params.max_tokens is not None:
                self._max_tokens.observe(start.params.max_tokens)
        if output.metrics is not None:
            self._observe_times(output.metrics, live)

    def _observe_times(self, times: EngineTimes, live: _Live) -> None:
        self._preemptions.observe(times.num_preemptions)
        scheduled, first, last = times.scheduled_ts, times.first_token_ts, times.last_token_ts
        if scheduled is None:
            return
        self._queue.observe(scheduled - times.arrival_time)
        if first is None or last is None:
            return
        self._prefill.observe(first - scheduled)
        self._decode.observe(last - first)
        self._inference.observe(last - scheduled)
        num_gaps = times.num_generation_tokens - live.completions
        if num_gaps > 0:
            mean_s = (last - first) * live.completions / num_gaps
            self._per_token.observe(mean_s)
            if not live.streams:  # its tokens came all at once: the engine knows the ends, so the mean is what is known
                self._between.observe(mean_s, num_gaps)
        if not live.streams:
            self._first_token.observe(first - times.arrival_time)

    def on_rejected(self, endpoint: str, status: int, reason: str) -> None:
        """A request was refused. Not by endpoint: at the gate that is whatever path a client made up."""
        self._rejected[str(status)] += 1

    def families(self, labels: dict[str, str]) -> Iterator[Metric]:
        """All histograms, and the refused requests."""
        for histogram in self._all:
            yield histogram.family(labels)
        family = CounterMetricFamily(
            "quire:rejected_requests", "Requests refused before they started.", labels=["status"]
        )
        for status, count in self._rejected.items():
            family.add_metric([status], count)
        yield family
