"""A profiler trace of XLA on CPU: which instruction ran when."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jax.profiler import ProfileData, ProfileOptions

_END = "end: "


@dataclass(frozen=True)
class Event:
    """One execution of one instruction. Times in nanoseconds from the start of the trace.

    Attributes:
        name: of the instruction. module: of its program. run: which execution of the program.
        start_ns, stop_ns: while it ran. A loop returns at once and goes on in the background: its stop is when its
            result was there.
    """

    name: str
    module: str
    run: int
    start_ns: float
    stop_ns: float


def options() -> ProfileOptions:
    """Instructions and when they end; no Python calls, which would slow the host down."""
    chosen = ProfileOptions()
    chosen.python_tracer_level = 0
    chosen.host_tracer_level = 2
    chosen.enable_hlo_proto = False
    return chosen


def read(directory: Path) -> list[Event]:
    """All events of the trace under a directory, by start.

    Raises:
        FileNotFoundError: there is no trace.
    """
    files = sorted(directory.rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"there is no *.xplane.pb under {directory}: was a trace taken?")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the extension types' own making
        return sorted(_events(files[-1]), key=lambda event: event.start_ns)


def _events(file: Path) -> Iterator[Event]:
    starts: list[tuple[Event, int | None]] = []
    stops: dict[int, float] = {}
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                stop_ns = event.start_ns + event.duration_ns
                if "hlo_op" in stats:
                    run = Event(event.name, str(stats["hlo_module"]), int(stats["run_id"]), event.start_ns, stop_ns)
                    starts.append((run, stats.get("_p")))
                elif event.name.startswith(_END) and "_c" in stats:
                    stops[stats["_c"]] = event.start_ns
    for event, flow in starts:
        stop_ns = max(event.stop_ns, stops.get(flow, 0.0)) if flow is not None else event.stop_ns
        yield Event(event.name, event.module, event.run, event.start_ns, stop_ns)
