"""A worker as the driver sees it: a process that answers questions, and is stopped between them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WAKE_S = 0.05  # for threads that were stopped to find their way back
EXIT_S = 20.0


class WorkerError(RuntimeError):
    """A worker answered that an operation failed; it can be asked again."""


class WorkerGoneError(RuntimeError):
    """A worker ended, or did not answer in time and was ended."""


class WorkerProcess:
    """One worker. Leads a process group of its own, so that it can be stopped with all its children.

    Args:
        command: starts the worker.
        environment: all of its variables.
        directory: to run in.
        log: gets its stderr.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path, log: Path) -> None:
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=directory,
                env=dict(environment),
                process_group=0,
            )
        self._log = log
        self._unread = b""
        self._is_gone = False

    @property
    def is_gone(self) -> bool:
        """True once it ended, or was ended."""
        return self._is_gone

    @property
    def group(self) -> int:
        """Process group of the worker and its children."""
        return self._process.pid

    def ask(self, op: str, timeout_s: float, **fields: Any) -> Any:
        """Ask for an operation and wait for its value.

        Raises:
            WorkerError: it failed there.
            WorkerGoneError: the worker ended, or took longer than `timeout_s` (then it is ended).
        """
        assert self._process.stdin is not None
        if self._is_gone:
            raise WorkerGoneError("the worker ended earlier")
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._process.stdin.flush()
            reply = json.loads(self._read_line(timeout_s))
        except BrokenPipeError:
            raise self._gone("ended") from None
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["value"]

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._gone(f"did not answer within {timeout_s:.0f} s")
                chunk = os.read(self._process.stdout.fileno(), 1 << 20)
                if not chunk:
                    raise self._gone("ended")
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _gone(self, what: str) -> WorkerGoneError:
        self.kill()
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["(empty)"]
        return WorkerGoneError(f"the worker {what}; the last line of {self._log.name}: {lines[-1][-200:]}")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The worker runs inside this context and is stopped after it."""
        self._signal(signal.SIGCONT)
        time.sleep(WAKE_S)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Let it end by itself, or end it."""
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.write(b'{"op": "stop"}\n')
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_S)
        self.kill()

    def kill(self) -> None:
        """End it now, with all its children."""
        self._is_gone = True
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)
