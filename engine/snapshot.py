"""A snapshot of an engine's counters and gauges as one flat dict."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.core import EngineCore
from engine.runtime.compile import COUNTER


def snapshot(core: EngineCore) -> dict[str, Any]:
    """Scheduler gauges, totals since the start, and the compilations that should not have been."""
    # Shallow copies, each made in one go: another thread may count a new finish reason meanwhile.
    totals = {**vars(core.stats), "finished": dict(core.stats.finished)}
    return {**asdict(core.scheduler.stats()), **totals, "compiles_after_ready": COUNTER.after_ready}
