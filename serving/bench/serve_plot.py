"""The figure of `quire bench serve`: latencies as distributions, load and output over time. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.bench.serve_metrics import BUCKET_S, RequestTrace, concurrency, tokens_per_bucket
from serving.errors import UsageError


def check_available() -> None:
    """Refuse before the run what could not be drawn after it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'quire-llm[bench]'.")


def draw(traces: Sequence[RequestTrace], title: str, file: Path) -> None:
    """Write the figure; the file's ending says which format.

    Raises:
        UsageError: the file cannot be written, or has an ending that matplotlib does not know.
    """
    from matplotlib.figure import Figure  # an optional extra, and slow to load

    done = [trace for trace in traces if trace.error is None]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _shares(axes[0][0], [trace.ttft_s for trace in done], "time to first token")
    _shares(axes[0][1], [gap for trace in done for gap in trace.itls_s], "time between chunks")
    rates = tokens_per_bucket(done)
    axes[1][0].stairs([rate / BUCKET_S for rate in rates], [i * BUCKET_S for i in range(len(rates) + 1)], fill=True)
    axes[1][0].set(xlabel="s", ylabel="output tokens/s", ylim=(0, None))
    steps = concurrency(done)
    axes[1][1].step([time for time, _ in steps], [running for _, running in steps], where="post")
    axes[1][1].set(xlabel="s", ylabel="requests running", ylim=(0, None))
    for axis in itertools.chain(*axes):
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9, wrap=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot draw {file}: {error}") from error


def _shares(axis: Any, seconds: Sequence[float], what: str) -> None:
    ordered = sorted(value * 1e3 for value in seconds)
    axis.step(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))], where="post")
    axis.set(xlabel=f"{what}, ms (n = {len(ordered)})", ylabel="share not longer", ylim=(0, 1.02))
