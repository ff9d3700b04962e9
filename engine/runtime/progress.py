"""Progress of long work (loading, compiling) on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Report(Protocol):
    """Called as work advances: units done, units in total, what is being worked on."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show it."""


@contextmanager
def progress_bar(title: str, *, show: bool) -> Iterator[Report]:
    """A bar that fills as the yielded function is called; nothing if not `show`."""
    if not show:
        yield lambda done, total, what: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console) as bars:
        tasks: list[TaskID] = []  # made with the first report: work that never starts shows no bar

        def report(done: int, total: int, what: str) -> None:
            if not tasks:
                tasks.append(bars.add_task(title, total=total, what=what))
            bars.update(tasks[0], completed=done, total=total, what=what)

        yield report
