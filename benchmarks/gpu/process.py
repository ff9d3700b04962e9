"""A worker process under a deadline: lines out of its stdout, and an end for it and all its children, always."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType


class DeadlineError(TimeoutError):
    """No line came in time."""


class LineProcess:
    """A process that leads a group of its own. Leaving the context kills the group, whatever state it is in.

    Args:
        command: what to run.
        environment: all of its variables.
        directory: to run in.
        log: gets its stderr, appended.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path, log: Path) -> None:
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=directory,
                env=dict(environment),
                process_group=0,
            )
        self._unread = b""

    def __enter__(self) -> LineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def read_line(self, deadline: float) -> str | None:
        """The next line without its end; None once the process closed its output.

        Args:
            deadline: on `time.monotonic()`.

        Raises:
            DeadlineError: nothing came until then.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise DeadlineError
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return None
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace")

    def exit_code(self, timeout_s: float = 10.0) -> int | None:
        """How it ended (negative: by that signal); None if it has not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """End the whole group now. Children that outlived their parent are ended as well."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # A process that the driver of the device holds in the kernel does not go even so: leave it behind.
        self.exit_code()
        if self._process.stdout is not None:
            self._process.stdout.close()
