"""Runs parts: starts their workers, writes what they say, kills what hangs, and goes on. Never touches a device."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from benchmarks.gpu.part import Case, Context, Part
from benchmarks.gpu.process import DeadlineError, LineProcess
from benchmarks.gpu.records import DIED, HUNG, Ended, ResultFile

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0  # for a worker to import what it needs before its first case begins
LOG_LINES = 3  # of a worker that died, for the record


@dataclass(frozen=True)
class Session:
    """How parts are run.

    Attributes:
        context: of all parts.
        registry: module that holds `PARTS`; workers import it.
        say: gets a line of progress.
    """

    context: Context
    registry: str
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)

    def file(self, part: Part) -> ResultFile:
        """Where the results of a part go."""
        return ResultFile(self.context.out / f"{part.name}.jsonl")

    def pending(self, part: Part) -> list[Case]:
        """The cases that have not ended."""
        ended = self.file(part).ended()
        return [case for case in part.cases(self.context.smoke) if case.name not in ended]

    def run(self, part: Part, limit_s: float) -> bool:
        """Run what is pending of a part. False if its time, or `limit_s` seconds, were over first."""
        until = time.monotonic() + min(part.limit_s, limit_s)
        while pending := self.pending(part):
            if time.monotonic() >= until:
                self.say(f"{part.name}: time is over, {len(pending)} cases are left for --resume")
                return False
            self._run_batch(part, _batch(pending), until)
        return True

    def _run_batch(self, part: Part, batch: list[Case], until: float) -> None:
        """Run cases in one process, until they are through, one of them hangs, or the process dies."""
        cases, first = {case.name: case for case in batch}, batch[0]
        file, log = self.file(part), self.context.out / f"{part.name}.log"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", self.registry, part.name, str(self.context.out)]
        command += [json.dumps(list(cases)), *(["--smoke"] if self.context.smoke else [])]
        current, begun, num_ended = first, time.monotonic(), 0
        deadline, running = begun + START_S + first.timeout_s, False
        with LineProcess(command, _environment(part, first, self.context.smoke), ROOT, log) as worker:
            while True:
                try:
                    line = worker.read_line(min(deadline, until))
                except DeadlineError:
                    if time.monotonic() >= deadline and (running or num_ended == 0):
                        self._lost(file, current, HUNG, begun, f"nothing came for {current.timeout_s:.0f} s; killed")
                    return
                event = None if line is None else _event(line)
                if line is None:
                    # Between two cases a worker may leave by itself: the next one starts on a sound device.
                    if running or num_ended == 0:
                        self._lost(file, current, DIED, begun, _last_words(worker.exit_code(), log))
                    return
                if event is None:
                    continue
                file.append(event)
                if event["event"] == "begin":
                    current, begun, running = cases[event["case"]], time.monotonic(), True
                    deadline = begun + current.timeout_s
                elif event["event"] == "end":
                    num_ended, running = num_ended + 1, False
                    deadline = time.monotonic() + START_S
                    self.say(f"{part.name}: {event['case']}: {event['status']} {event.get('reason', '')}".rstrip())
                    if num_ended == len(batch):
                        return

    def _lost(self, file: ResultFile, case: Case, status: str, begun: float, reason: str) -> None:
        file.end(Ended(case.name, status, time.monotonic() - begun, reason))
        self.say(f"{file.path.stem}: {case.name}: {status} ({reason})")


def _batch(pending: Sequence[Case]) -> list[Case]:
    """The cases that the next worker runs."""
    if pending[0].own_process:
        return [pending[0]]
    return list(takewhile(lambda case: not case.own_process, pending))


def _environment(part: Part, case: Case, smoke: bool) -> dict[str, str]:
    variables = dict(os.environ) | dict(part.environment)
    extra: Mapping[str, str] = case.environment
    for name, value in extra.items():
        variables[name] = f"{variables.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value
    # A session is for a machine without a network; a smoke run must not look for a GPU.
    return variables | {"HF_HUB_OFFLINE": "1"} | ({"JAX_PLATFORMS": "cpu"} if smoke else {})


def _event(line: str) -> dict | None:
    """A worker's line; None for what a library wrote to the same place before it was redirected."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _last_words(code: int | None, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
    return f"exit status {code}; its last words: " + " | ".join(line[-200:] for line in lines)
