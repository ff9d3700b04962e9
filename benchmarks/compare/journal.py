"""What a run found out, line by line, in `journal.jsonl`: whoever is stopped goes on from there (`--resume`).

A line is written when it is known, and ends with a newline; a last line without one was cut off and is dropped. Besides
the measurements the journal keeps the generated ids, which the results do not hold: engines that were measured in
another part of a run are compared token by token all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.compare.results import Lane, Measurement, PeerFacts, Start

FILE = "journal.jsonl"
Outputs = list[list[int]]


class JournalError(RuntimeError):
    """A journal is in the way, or belongs to another run."""


class Journal:
    """A run's journal, read and ready to be written on.

    Args:
        directory: of the results.
        conditions: what must be the same in all parts of a run, such as dtype and commit.
        resume: go on with a journal that is there.

    Raises:
        JournalError: one is there and `resume` is not set, or it was written under other conditions.
    """

    def __init__(self, directory: Path, conditions: Mapping[str, Any], *, resume: bool) -> None:
        self._file = directory / FILE
        self.measurements: list[tuple[Measurement, Outputs | None]] = []
        self.peers: dict[str, PeerFacts] = {}
        self.starts: list[Start] = []
        self.ceilings = Ceilings()
        self.parts: list[dict[str, Any]] = []
        lines = self._complete_lines()
        if lines and not resume:
            raise JournalError(f"{directory} has results: --resume goes on with them, --out names another folder.")
        for line in lines:
            self._take(json.loads(line), conditions)
        if not lines:
            self._write({"conditions": dict(conditions)})

    def _complete_lines(self) -> list[bytes]:
        """The lines that were written whole; what comes after them is cut off the file."""
        if not self._file.exists():
            return []
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self._file.write_bytes(whole)
        return whole.splitlines()

    def _take(self, line: dict[str, Any], conditions: Mapping[str, Any]) -> None:
        match line:
            case {"conditions": earlier}:
                other = [
                    f"{k}: {earlier.get(k)!r}, now {now!r}" for k, now in conditions.items() if earlier.get(k) != now
                ]
                if other:
                    raise JournalError(f"{self._file} was written under other conditions ({'; '.join(other)}).")
            case {"part": part}:
                self.parts.append(part)
            case {"peer": name, "facts": facts}:
                self.peers[name] = PeerFacts.from_json(facts)
            case {"ceilings": ceilings}:
                self.ceilings = self.ceilings.merged(Ceilings(**ceilings))
            case {"start": start}:
                self.starts.append(Start(**start))
            case {"measurement": m, "outputs": outputs}:
                self.measurements.append((Measurement(**m | {"lane": Lane(**m["lane"])}), outputs))
            case _:
                raise JournalError(f"{self._file} has a line that means nothing: {str(line)[:80]}")

    def _write(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def begin_part(self, part: dict[str, Any]) -> None:
        """A process begins to add to the journal: when and with which command."""
        self.parts.append(part)
        self._write({"part": part})

    def add_peer(self, name: str, facts: PeerFacts) -> None:
        """A worker is ready."""
        self.peers[name] = facts
        self._write({"peer": name, "facts": asdict(facts)})

    def add_ceilings(self, ceilings: Ceilings) -> None:
        """The machine's limits were measured."""
        self.ceilings = self.ceilings.merged(ceilings)
        self._write({"ceilings": ceilings.as_json()})

    def add_start(self, start: Start) -> None:
        """A start was timed."""
        self.starts.append(start)
        self._write({"start": asdict(start)})

    def add_measurement(self, measurement: Measurement, outputs: Outputs | None) -> None:
        """A turn is over; `outputs`: the generated ids, None if it failed."""
        self.measurements.append((measurement, outputs))
        self._write({"measurement": asdict(measurement), "outputs": outputs})
