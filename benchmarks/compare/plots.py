"""Figures from results: bars per workload, throughput by concurrency, distribution of the times between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.compare.results import Lane, Results, Summary, best_lane, gaps_ms, metrics_of
from benchmarks.workloads.cpu_smollm2 import STREAMS

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot  # noqa: E402 - the backend comes first
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import ScalarFormatter  # noqa: E402


def draw(results: Results, directory: Path) -> list[Path]:
    """Write the figures as PNG files and return their paths."""
    files = []
    if any(name not in STREAMS for name in results.workloads):
        files.append(directory / "workloads.png")
        _bars(results, files[-1])
    if any(name in STREAMS for name in results.workloads):
        files.append(directory / "throughput.png")
        _streams(results, files[-1])
    if any(gaps_ms(results.counted(name, lane)) for name in results.workloads for lane in results.lanes(name)):
        files.append(directory / "itl.png")
        _gaps(results, files[-1])
    return files


def _title(results: Results) -> str:
    cut = "QUICK LOOK, workloads cut; " if results.run.cut else ""
    machine = results.run.machine
    return f"{cut}{results.run.dtype}, {machine.get('cpu_count', '?')} cores, {results.run.date}"


def _colors(results: Results) -> dict[Lane, str]:
    """One colour per lane, the same in every figure."""
    lanes = dict.fromkeys(lane for name in results.workloads for lane in results.lanes(name))
    return {lane: f"C{index % 10}" for index, lane in enumerate(lanes)}


def _bars(results: Results, file: Path) -> None:
    colors = _colors(results)
    names = [name for name in results.workloads if name not in STREAMS]
    width = max(4.2, 0.8 * len(colors))
    figure, axes = pyplot.subplots(1, len(names), figsize=(width * len(names), 4.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        _workload_bars(axis, results, name, colors)
    spread = f"median, lowest and highest of {results.run.num_repetitions}"
    figure.suptitle(f"{spread}; {_title(results)}", fontsize=9, wrap=True)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _workload_bars(axis: Axes, results: Results, name: str, colors: dict[Lane, str]) -> None:
    workload, metric = results.workloads[name], metrics_of(name)[0]
    bars: list[tuple[Lane, Summary]] = []
    for lane in results.lanes(name):
        summary = metric.summary(workload, results.counted(name, lane))
        if summary is not None:
            bars.append((lane, summary))
    heights = [summary.median for _, summary in bars]
    below = [summary.median - summary.low for _, summary in bars]
    above = [summary.high - summary.median for _, summary in bars]
    labels = [str(lane).replace(" (", "\n(").replace("-", "-\n", 1) for lane, _ in bars]
    drawn = axis.bar(labels, heights, yerr=[below, above], capsize=4, color=[colors[lane] for lane, _ in bars])
    axis.bar_label(drawn, fmt=f"%.{metric.digits}f", fontsize=8, padding=2)
    axis.margins(y=0.15)
    better = "higher" if metric.higher_is_better else "lower"
    axis.set_title(f"{name.upper()}: {metric.name} ({better} is better)", fontsize=9)
    axis.tick_params(axis="x", labelsize=7)


def _streams(results: Results, file: Path) -> None:
    """Of each engine its best way at each number of streams: median, lowest and highest."""
    figure, axis = pyplot.subplots(figsize=(7, 4.4))
    colors = _colors(results)
    counts = [STREAMS[name].num_requests for name in STREAMS if name in results.workloads]
    for peer in results.peers:
        points: list[tuple[int, Summary]] = []
        for name in (name for name in STREAMS if name in results.workloads):
            lane = best_lane(results, name, peer)
            summary = lane and metrics_of(name)[0].summary(results.workloads[name], results.counted(name, lane))
            if summary is not None:
                points.append((STREAMS[name].num_requests, summary))
        if points:
            middle = [summary.median for _, summary in points]
            spread = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
            where = [count for count, _ in points]
            color = next(color for lane, color in colors.items() if lane.peer == peer)
            axis.errorbar(where, middle, yerr=spread, marker="o", capsize=3, label=peer, color=color)
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("streams at once")
    axis.set_ylabel("output tok/s")
    axis.set_title(f"Throughput by concurrency\n{_title(results)}", fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _gaps(results: Results, file: Path) -> None:
    colors = _colors(results)
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name in results.workloads:
        for lane in results.lanes(name):
            gaps = sorted(gaps_ms(results.counted(name, lane)))
            if gaps:
                axis.step(gaps, _shares(gaps), where="post", label=f"{lane}, n = {len(gaps)}", color=colors[lane])
    axis.set_xscale("log")
    for set_formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        set_formatter(ScalarFormatter())
    axis.set_xlabel("time between two tokens, ms")
    axis.set_ylabel("share of gaps that are not longer")
    axis.set_title(f"W1: inter-token latency\n{_title(results)}", fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _shares(ordered: Sequence[float]) -> list[float]:
    return [(index + 1) / len(ordered) for index in range(len(ordered))]
