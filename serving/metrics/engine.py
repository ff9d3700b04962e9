"""The engine's counters and gauges as metric families, from one snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.client import EngineInfo
from serving.metrics.histograms import STEP_TOKENS, Histogram

FINISH_REASONS = ("stop", "length", "abort", "error")
HOST_PARTS = ("plan", "dispatch", "collect", "commit")


class Simple(NamedTuple):
    """A metric that is one entry of the snapshot."""

    name: str
    help: str
    key: str


GAUGES = (
    Simple("vllm:num_requests_running", "Sequences that run: they own a row of the device state.", "num_running"),
    Simple(
        "vllm:num_requests_waiting", "Sequences that wait for a row or for blocks, preempted included.", "num_waiting"
    ),
    Simple(
        "vllm:kv_cache_usage_perc", "Share of the KV blocks that sequences hold; 1 means all of them.", "kv_cache_usage"
    ),
    Simple("quire:steps_in_flight", "Steps dispatched and not yet read.", "num_in_flight"),
)
COUNTERS = (
    Simple("vllm:prompt_tokens", "Prompt tokens of sequences whose prompt is computed.", "prompt_tokens"),
    Simple("vllm:prompt_tokens_cached", "Those of them that came out of the prefix cache.", "cached_prompt_tokens"),
    Simple("vllm:generation_tokens", "Tokens that sequences got.", "generation_tokens"),
    Simple("vllm:num_preemptions", "How often a sequence lost its blocks.", "num_preemptions"),
    Simple("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", "num_prefix_queried_tokens"),
    Simple("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", "num_prefix_hit_tokens"),
    Simple("vllm:admission_rejections", "Requests refused because the queue was full.", "num_rejected"),
    Simple("vllm:spec_decode_num_drafts", "How often a sequence had drafts in a step.", "num_drafts"),
    Simple("vllm:spec_decode_num_draft_tokens", "Drafts that were verified.", "num_draft_tokens"),
    Simple("vllm:spec_decode_num_accepted_tokens", "Drafts that were right.", "num_accepted_tokens"),
    Simple("quire:steps", "Steps dispatched.", "num_steps"),
    Simple("quire:failed_steps", "Steps that raised an error.", "num_failed_steps"),
    Simple("quire:step_tokens", "Tokens computed in steps, without padding.", "num_tokens"),
    Simple("quire:padded_tokens", "Rows of the buckets that steps ran in, padding included.", "num_padded_tokens"),
)


def engine_families(snapshot: Mapping[str, Any], info: EngineInfo, labels: dict[str, str]) -> Iterator[Metric]:
    """All metrics of a snapshot.

    Args:
        snapshot: of `EngineClient.snapshot`.
        labels: of every sample.

    Raises:
        KeyError: the snapshot lacks an entry.
    """
    names, values = list(labels), list(labels.values())
    for gauge in GAUGES:
        family = GaugeMetricFamily(gauge.name, gauge.help, labels=names)
        family.add_metric(values, snapshot[gauge.key])
        yield family
    for counter in COUNTERS:
        family = CounterMetricFamily(counter.name, counter.help, labels=names)
        family.add_metric(values, snapshot[counter.key])
        yield family
    # A gauge, not a counter: it must be 0, and an alert compares it with 0.
    family = GaugeMetricFamily("quire:compiles_after_ready", "Compilations since the engine was ready.", labels=names)
    family.add_metric(values, snapshot["compiles_after_ready"])
    yield family
    yield from _labelled(snapshot, labels)
    steps = Histogram("vllm:iteration_tokens_total", "Tokens per step.", STEP_TOKENS)
    steps.observe_all((int(tokens), count) for tokens, count in snapshot["step_tokens"].items())
    yield steps.family(labels)
    yield _cache_config(info, labels)


def _labelled(snapshot: Mapping[str, Any], labels: dict[str, str]) -> Iterator[Metric]:
    names, values = list(labels), list(labels.values())
    ended = CounterMetricFamily(
        "vllm:request_success", "Sequences that ended, by reason.", labels=[*names, "finished_reason"]
    )
    for reason in sorted({*FINISH_REASONS, *snapshot["finished"]}):
        ended.add_metric([*values, reason], snapshot["finished"].get(reason, 0))
    yield ended
    cached, prompt = snapshot["cached_prompt_tokens"], snapshot["prompt_tokens"]
    sources = CounterMetricFamily("vllm:prompt_tokens_by_source", "Prompt tokens by source.", labels=[*names, "source"])
    sources.add_metric([*values, "local_compute"], prompt - cached)
    sources.add_metric([*values, "local_cache_hit"], cached)
    yield sources
    right = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Drafts that were right, by their place behind the known tokens.",
        labels=[*names, "position"],
    )
    for place, count in enumerate(snapshot["accepted_at"]):
        right.add_metric([*values, str(place)], count)
    yield right
    host = CounterMetricFamily(
        "quire:host_seconds", "Time of the engine's thread per part of its loop.", labels=[*names, "part"]
    )
    for part in HOST_PARTS:
        host.add_metric([*values, part], snapshot[f"{part}_s"])
    yield host


def _cache_config(info: EngineInfo, labels: dict[str, str]) -> Metric:
    config = {
        **labels,
        "block_size": str(info.block_size),
        "num_gpu_blocks": str(info.num_kv_blocks),
        "cache_dtype": str(info.description.get("kv_cache_dtype", "")),
    }
    family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's configuration.", labels=list(config))
    family.add_metric(list(config.values()), 1)
    return family
