"""Tables and the figure of `benchmarks.speculative`: speedup by batch size, and how often drafts were right."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.markdown import table


@dataclass(frozen=True)
class Turn:
    """One repetition: the same requests without drafts and with them.

    Attributes:
        plain_s, guessing_s: seconds for all requests.
        plain_decode_s, guessing_decode_s: of them, those in which all requests at a time had their first token.
        num_requests, num_output_tokens: the same both ways.
        num_same: requests that gave the same tokens both ways.
        num_drafts, num_draft_tokens: how often a request had drafts in a step, and how many.
        accepted_per_pos: [place], how often the draft in that place was right.
    """

    plain_s: float
    guessing_s: float
    plain_decode_s: float
    guessing_decode_s: float
    num_requests: int
    num_output_tokens: int
    num_same: int
    num_drafts: int
    num_draft_tokens: int
    accepted_per_pos: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    Attributes:
        dtype: of weights and KV cache.
        lane: method and settings.
        workload: its name.
        streams: requests at a time.
        turns: counted repetitions.
    """

    dtype: str
    lane: str
    workload: str
    streams: int
    turns: list[Turn]

    @property
    def place(self) -> tuple[str, str, str, int]:
        """In a report: what no two cells of it share."""
        return self.workload, self.dtype, self.lane, self.streams


class Speedup(NamedTuple):
    """Time without drafts over time with them: median, lowest and highest of the repetitions."""

    median: float
    low: float
    high: float


def speedup(cell: Cell) -> Speedup:
    """Of one cell: of its ratios, repetition by repetition."""
    return _of([turn.plain_s / turn.guessing_s for turn in cell.turns])


def decode_speedup(cell: Cell) -> Speedup:
    """Likewise without the prompts."""
    return _of([turn.plain_decode_s / turn.guessing_decode_s for turn in cell.turns])


def _of(ratios: Sequence[float]) -> Speedup:
    return Speedup(statistics.median(ratios), min(ratios), max(ratios))


def markdown(cells: Sequence[Cell], facts: dict[str, Any]) -> str:
    """The report."""
    machine = facts["machine"]
    quick = "QUICK LOOK, no measurement. " if facts["quick"] else ""
    parts = [
        f"# Speculative decoding, {facts['date']}",
        f"{quick}{machine['processor']}, {machine['cpu_count']} cores; {facts['model']}, greedy, "
        f"{facts['repetitions']} repetitions in turn after a warm-up. Speedup: time without drafts over time with "
        "them, prompts included; median (lowest–highest). Decode: the same without the time until all requests of a "
        "batch have their first token.",
    ]
    for dtype, workload in dict.fromkeys((cell.dtype, cell.workload) for cell in cells):
        chosen = [cell for cell in cells if (cell.dtype, cell.workload) == (dtype, workload)]
        parts += [f"## {workload}, {dtype}", _speedups(chosen), _drafts(chosen)]
    return "\n\n".join(parts) + "\n"


def _speedups(cells: Sequence[Cell]) -> str:
    sizes = sorted({cell.streams for cell in cells})
    found = {(cell.lane, cell.streams): cell for cell in cells}
    plain = {
        size: statistics.median(
            turn.num_output_tokens / turn.plain_s for cell in cells if cell.streams == size for turn in cell.turns
        )
        for size in sizes
    }
    rows = [["without, output tok/s", *(f"{plain[size]:.0f}" for size in sizes)]]
    for lane in dict.fromkeys(cell.lane for cell in cells):
        for name, figure in ((lane, speedup), (f"{lane}: decode", decode_speedup)):
            every = [found.get((lane, size)) for size in sizes]
            rows.append([name, *("" if c is None else "{:.2f}× ({:.2f}–{:.2f})".format(*figure(c)) for c in every)])
    return table(("streams", *map(str, sizes)), rows)


def _drafts(cells: Sequence[Cell]) -> str:
    rows = []
    for cell in cells:
        num_drafts = sum(turn.num_drafts for turn in cell.turns)
        num_draft_tokens = sum(turn.num_draft_tokens for turn in cell.turns)
        accepted = _sum_by_place(cell.turns)
        outputs = sum(turn.num_output_tokens for turn in cell.turns)
        same = sum(turn.num_same for turn in cell.turns) / sum(turn.num_requests for turn in cell.turns)
        rows.append(
            [
                cell.lane,
                str(cell.streams),
                f"{num_draft_tokens / num_drafts:.1f}" if num_drafts else "–",
                f"{sum(accepted) / num_draft_tokens:.0%}" if num_draft_tokens else "–",
                " ".join(f"{count / num_drafts:.0%}" for count in accepted) if num_drafts else "–",
                # Each step with right drafts saves as many steps.
                f"{outputs / (outputs - sum(accepted)):.2f}",
                f"{same:.0%}",
            ]
        )
    header = ("", "streams", "drafts a step", "right", "right by place", "tokens a step and request", "same answers")
    return table(header, rows)


def _sum_by_place(turns: Sequence[Turn]) -> list[int]:
    return [sum(column) for column in zip_longest(*(turn.accepted_per_pos for turn in turns), fillvalue=0)]


def draw(cells: Sequence[Cell], facts: dict[str, Any], file: Path) -> bool:
    """Speedup against streams, a panel for each workload and dtype. False, and no file, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((cell.workload, cell.dtype) for cell in cells))
    colors = {lane: f"C{index % 10}" for index, lane in enumerate(dict.fromkeys(cell.lane for cell in cells))}
    figure = Figure(figsize=(5 * len(panels), 4))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, [cell for cell in cells if (cell.workload, cell.dtype) == panel], colors)
        axis.set_title(", ".join(panel), fontsize=9)
    axes[0].set_ylabel("speedup: time without drafts / time with them")
    # Not every lane is in every panel.
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label() in colors}
    axes[-1].legend(handles=list(lines.values()), fontsize=8)
    quick, cores = "QUICK LOOK; " if facts["quick"] else "", facts["machine"]["cpu_count"]
    spread = f"median, lowest and highest of {facts['repetitions']}"
    figure.suptitle(f"{quick}{facts['model']}, {cores} cores, {facts['date']}; {spread}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    return True


def _panel(axis: Any, cells: Sequence[Cell], colors: dict[str, str]) -> None:
    for lane, color in colors.items():
        line = sorted((cell for cell in cells if cell.lane == lane), key=lambda cell: cell.streams)
        if line:
            sizes, found = [cell.streams for cell in line], [speedup(cell) for cell in line]
            axis.plot(sizes, [s.median for s in found], marker="o", label=lane, color=color)
            axis.fill_between(sizes, [s.low for s in found], [s.high for s in found], color=color, alpha=0.15)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    ticks = sorted({cell.streams for cell in cells})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("requests at a time")
    axis.grid(alpha=0.3)
