"""Result files: one JSON line per event, appended and flushed as it comes.

    {"event": "begin", "case": NAME, "at": "2026-11-25 10:00:00"}
    {"event": "result", "case": NAME, ...}                                        any number of them
    {"event": "end", "case": NAME, "status": STATUS, "seconds": S, "reason": …}   reason: unless done

A case without an end line is not finished: a resumed session runs it again, and what its earlier attempt gave does not
count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Record

DONE, SKIPPED, FAILED, HUNG, DIED = "done", "skipped", "failed", "hung", "died"
STATUSES = (DONE, SKIPPED, FAILED, HUNG, DIED)


@dataclass(frozen=True)
class Ended:
    """How a case ended."""

    case: str
    status: str
    seconds: float
    reason: str = ""


class ResultFile:
    """The result file of one part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Record) -> None:
        """Write one line; it is in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, default=str) + "\n")

    def end(self, ended: Ended) -> None:
        """Write that a case ended."""
        reason = {"reason": ended.reason} if ended.reason else {}
        self.append(
            {"event": "end", "case": ended.case, "status": ended.status, "seconds": round(ended.seconds, 3), **reason}
        )

    def events(self) -> Iterator[dict[str, Any]]:
        """All lines. A last line that was cut off by a kill is left out."""
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def ended(self) -> dict[str, Ended]:
        """Case -> how it ended, of those that did."""
        return {
            e["case"]: Ended(e["case"], e["status"], e["seconds"], e.get("reason", ""))
            for e in self.events()
            if e["event"] == "end"
        }

    def results(self) -> list[Record]:
        """Results of the last attempt of each case, in the order in which the cases first began.

        Those of a case that hung or died half way are among them.
        """
        by_case: dict[str, list[Record]] = {}
        for event in self.events():
            match event["event"]:
                case "begin":
                    by_case[event["case"]] = []
                case "result":
                    by_case.setdefault(event["case"], []).append(
                        {key: value for key, value in event.items() if key != "event"}
                    )
        return [record for records in by_case.values() for record in records]


def is_complete(file: ResultFile, cases: Iterable[str]) -> bool:
    """True if every case ended, one way or another."""
    return set(cases) <= set(file.ended())
