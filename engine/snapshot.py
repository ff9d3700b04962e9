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
    per step; `num_executable_waits` and `executable_wait_s` are waits of steps for an executable that was planned and
    not made yet (`compile_in_background`), `compiles_after_ready` compilations that nobody had planned.
    """
    # Shallow copies, each made in one go: another thread may count a new finish reason meanwhile.
    totals = {
        **vars(core.stats),
        "finished": dict(core.stats.finished),
        "step_tokens": dict(core.stats.step_tokens),
        "accepted_at": list(core.stats.accepted_at),
    }
    made = core.executor.executables.stats
    executables = {
        "num_executables": made.num_all,
        "num_executables_ready": made.num_ready,
        "num_executable_waits": made.num_waits,
        "executable_wait_s": made.waited_s,
    }
    return {
        **asdict(core.scheduler.stats()),
        **totals,
        **executables,
        "compiles_after_ready": COUNTER.after_ready,
    }
