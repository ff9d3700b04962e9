"""What is watched while the load runs: memory of the server's processes, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "generated": "vllm:generation_tokens_total",
    "compiles": "quire:compiles_after_ready",
}
GROWTH_MIB = 24.0  # what an allocator may keep for itself between two quarters of a soak
GROWTH_SHARE = 0.02


@dataclass(frozen=True)
class Sample:
    """One look at the server.

    Attributes:
        time_s: since the load began.
        rss_mib: of all its processes together.
        values: of `GAUGES`.
    """

    time_s: float
    rss_mib: float
    values: dict[str, float]


async def read_metrics(session: aiohttp.ClientSession, base_url: str) -> dict[str, float]:
    """The values of `GAUGES`, summed over their labels."""
    async with session.get(f"{base_url}/metrics") as response:
        response.raise_for_status()
        text = await response.text()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return {ours: totals[theirs] for ours, theirs in GAUGES.items()}


def growth(samples: Sequence[Sample]) -> tuple[float, float]:
    """Median memory, in MiB, in the second and in the last quarter of the time. The first quarter warms up."""
    end = samples[-1].time_s
    second = [s.rss_mib for s in samples if end / 4 <= s.time_s < end / 2]
    last = [s.rss_mib for s in samples if s.time_s >= 3 * end / 4]
    return median(second), median(last)


def grows(samples: Sequence[Sample]) -> bool:
    """True if memory rises by more than an allocator's noise between the second and the last quarter."""
    before, after = growth(samples)
    return after - before > max(GROWTH_MIB, GROWTH_SHARE * before)
