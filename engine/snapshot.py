"""A snapshot of an engine's counters and gauges as one flat dict."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.core import EngineCore
from engine.runtime.compile import COUNTER


def snapshot(core: EngineCore) -> dict[str, Any]:
    """Scheduler gauges, totals since the start, and the compilations that should not have been.

    What a Prometheus exporter calls: `num_prefix_queried_tokens` and `num_prefix_hit_tokens` are the prefix cache's
    queries and hits; `num_tokens / num_padded_tokens` is the share of rows that was no padding; `plan_s`, `dispatch_s`,
    `collect_s` and `commit_s` over `num_steps` is the host's time per step; `step_tokens` is the histogram of tokens
    per step.
    """
    # Shallow copies, each made in one go: another thread may count a new finish reason meanwhile.
    totals = {
        **vars(core.stats),
        "finished": dict(core.stats.finished),
        "step_tokens": dict(core.stats.step_tokens),
        "accepted_at": list(core.stats.accepted_at),
    }
    return {**asdict(core.scheduler.stats()), **totals, "compiles_after_ready": COUNTER.after_ready}
