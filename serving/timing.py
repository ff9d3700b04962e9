"""Speeds from timestamps and percentiles from lists, each with one definition for all commands.

TTFT: arrival to first token. E2E: arrival to last token. TPOT: (E2E - TTFT) / (tokens - 1). All in seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from engine.outputs import RequestMetrics, RequestOutput


@dataclass(frozen=True)
class Timing:
    """The speed of one request. None where there is nothing to measure, as the time per token of a single token.

    Attributes:
        ttft_s: arrival to first token, in seconds.
        tpot_s: time per output token after the first, in seconds. With n completions, over the tokens of all of them.
        e2e_s: arrival to last token, in seconds.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens per second after the first token: 1 / TPOT."""
        return 1 / self.tpot_s if self.tpot_s else None

    @classmethod
    def from_metrics(cls, metrics: RequestMetrics | None, num_tokens: int, num_completions: int = 1) -> Timing:
        """The speed of a request that generated `num_tokens` tokens in all its completions together."""
        if metrics is None or metrics.first_token_ts is None or metrics.last_token_ts is None:
            return cls()
        later_tokens = num_tokens - num_completions
        return cls(
            ttft_s=metrics.first_token_latency,
            tpot_s=(metrics.last_token_ts - metrics.first_token_ts) / later_tokens if later_tokens > 0 else None,
            e2e_s=metrics.last_token_ts - metrics.arrival_time,
        )

    @classmethod
    def of(cls, output: RequestOutput) -> Timing:
        """The speed of a finished request."""
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        return cls.from_metrics(output.metrics, num_tokens, len(output.outputs))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` % of `values` lie, linear between neighbours (numpy's default method).

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("There is no percentile of no values.")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(values: Sequence[float], percents: Sequence[float] = (50, 90, 99)) -> dict[str, float]:
    """`mean`, `std`, `min`, `max` and the percentiles `p50` … of `values`; an empty dict if there are none."""
    if not values:
        return {}
    summary = {
        "mean": statistics.fmean(values),
        "std": statistics.pstdev(values),
        "min": min(values),
        "max": max(values),
    }
    return summary | {f"p{percent}": percentile(values, percent) for percent in percents}


def format_speed(timing: Timing) -> str:
    """`TTFT 45 ms · 41.3 tokens/s`; a dash where there is nothing to measure."""
    ttft = "-" if timing.ttft_s is None else f"{timing.ttft_s * 1e3:.0f} ms"
    rate = "-" if timing.tokens_per_s is None else f"{timing.tokens_per_s:.1f} tokens/s"
    return f"TTFT {ttft} · {rate}"
