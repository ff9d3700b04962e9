"""`quire serve` as a child process, for measurements and soaks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_S = 600.0
EXIT_S = 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    base_url: str

    def stop(self) -> int | None:
        """Send SIGTERM and wait.

        Returns:
            The exit code; None if it did not end in time.
        """
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        return self.process.poll()


@contextlib.contextmanager
def server_process(model: str, flags: Sequence[str], log: Path) -> Iterator[ServerProcess]:
    """Start a server on a free port of this machine and wait until it is ready. At the end it is killed if it runs.

    Args:
        flags: of `quire serve`.
        log: gets its output.

    Raises:
        SystemExit: it ended at its start, or was not ready in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serving.cli", "serve", model, "--host", "127.0.0.1", "--port", str(port), *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        server = ServerProcess(process, f"http://127.0.0.1:{port}")
        _wait_ready(server, log)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait_ready(server: ServerProcess, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise SystemExit(f"the server ended at its start with exit code {server.process.returncode}: see {log}")
        if _is_ready(server.base_url):
            return
        time.sleep(0.2)
    raise SystemExit(f"the server was not ready within {START_S:.0f} s: see {log}")


def _is_ready(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def descendants(root: int) -> list[int]:
    """A process and its descendants, itself first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name, in brackets, may itself hold brackets and spaces.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def rss_mib(pids: Sequence[int]) -> float:
    """Resident memory of processes, in MiB; a page that two of them share counts twice."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, in user and in kernel mode, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
