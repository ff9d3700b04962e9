"""What `quire bench serve` reports, from the recorded times of each request: pure functions.

    sent          chunk 0        chunk 1   chunk 2           chunk 3
     |── TTFT ──────|──── ITL ─────|── ITL ──|───── ITL ────────|
     |── E2EL ──────────────────────────────────────────────────|       TPOT = (E2EL - TTFT) / (output tokens - 1)

Defined as in `vllm bench serve`. A chunk is one server-sent event with an answer in it. A server may put several tokens
in one, so tokens are never counted by chunks: their number is what the server says in `usage`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.timing import summarise

GOODPUT_METRICS = ("ttft", "tpot", "e2el")
BUCKET_S = 1.0  # of the peak of output tokens


@dataclass(frozen=True)
class RequestTrace:
    """One request as the client saw it. Times in seconds since the start of the run.

    Attributes:
        sent_s: when it was sent.
        chunk_times_s: when each chunk arrived, in order.
        num_prompt_tokens, num_output_tokens: as the server counted them.
        error: why it failed; None if it did not.
    """

    sent_s: float
    chunk_times_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Sent to first chunk."""
        return self.chunk_times_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """Sent to last chunk."""
        return self.chunk_times_s[-1] - self.sent_s

    @property
    def end_s(self) -> float:
        """When the last chunk arrived."""
        return self.chunk_times_s[-1]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with one token."""
        if self.num_output_tokens <= 1:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Times between neighbouring chunks."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunk_times_s)]


def metrics(
    traces: Sequence[RequestTrace],
    duration_s: float,
    *,
    percents: Sequence[float] = (99,),
    goodput_ms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All figures, under the names of `vllm bench serve`'s result file.

    Args:
        traces: of all requests, failed ones too (they count as failed and nowhere else).
        duration_s: from the first request sent to the last one ended.
        percents: which percentiles of each latency.
        goodput_ms: the limits that a good request keeps: "ttft", "tpot", "e2el" to milliseconds.

    Returns:
        Counts, rates per second, and for each of ttft, tpot, itl, e2el its mean, median, std and percentiles in
        milliseconds (None if there was nothing to measure).
    """
    done = [trace for trace in traces if trace.error is None]
    num_input = sum(trace.num_prompt_tokens for trace in done)
    num_output = sum(trace.num_output_tokens for trace in done)
    values: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(traces) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration_s,
        "request_goodput": sum(_is_good(trace, goodput_ms) for trace in done) / duration_s if goodput_ms else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": max(tokens_per_bucket(done), default=0.0),
        "max_concurrent_requests": max((running for _, running in concurrency(done)), default=0),
    }
    latencies = {
        "ttft": [trace.ttft_s for trace in done],
        "tpot": [trace.tpot_s for trace in done if trace.tpot_s is not None],
        "itl": [gap for trace in done for gap in trace.itls_s],
        "e2el": [trace.e2el_s for trace in done],
    }
    for name, seconds in latencies.items():
        values |= _latency(name, seconds, percents)
    return values


def _is_good(trace: RequestTrace, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request keeps all limits. One with a single token has no time per token, and keeps any limit of it."""
    measured = {"ttft": trace.ttft_s, "tpot": trace.tpot_s or 0.0, "e2el": trace.e2el_s}
    return all(measured[name] * 1e3 <= limit for name, limit in limits_ms.items())


def _latency(name: str, seconds: Sequence[float], percents: Sequence[float]) -> dict[str, float | None]:
    milliseconds = [value * 1e3 for value in seconds]
    found = summarise(milliseconds, (50, *percents))
    values: dict[str, float | None] = {
        f"mean_{name}_ms": found.get("mean"),
        f"median_{name}_ms": found.get("p50"),
        f"std_{name}_ms": found.get("std"),
    }
    return values | {f"p{percent:g}_{name}_ms": found.get(f"p{percent}") for percent in percents}


def tokens_per_bucket(done: Sequence[RequestTrace]) -> list[float]:
    """Output tokens in each second since the first request was sent.

    A chunk counts as many tokens as the chunks of its request have on average: one, unless the server merges tokens.
    """
    if not done:
        return []
    start = min(trace.sent_s for trace in done)
    buckets = [0.0] * (math.floor((max(trace.end_s for trace in done) - start) / BUCKET_S) + 1)
    for trace in done:
        tokens_per_chunk = trace.num_output_tokens / len(trace.chunk_times_s)
        for time in trace.chunk_times_s:
            buckets[math.floor((time - start) / BUCKET_S)] += tokens_per_chunk
    return buckets


def concurrency(done: Sequence[RequestTrace]) -> list[tuple[float, int]]:
    """(time, requests running from then on) at each change. One that ends as another is sent never runs beside it."""
    changes = sorted([(trace.sent_s, 1) for trace in done] + [(trace.end_s, -1) for trace in done])
    running = itertools.accumulate(change for _, change in changes)
    return [(time, count) for (time, _), count in zip(changes, running, strict=True)]
