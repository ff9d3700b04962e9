"""`WorkerProcess`: one life of the engine's process, and the socket to it. For asyncio; no jax.

A socket pair of which the worker inherits one end: nobody else can connect, nothing lies in a directory, and each side
learns of the other's death by the end of the stream.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Self, cast

import msgspec

from engine.config import worker_environment
from engine.remote.wire import Frames, FromWorker, MessageTooLongError, ToWorker, frame, from_worker_decoder

WORKER_MODULE = "engine.remote.worker"
_STDERR = 2  # the worker's standard output goes there too: ours may be a pipe that somebody parses


class WorkerProcess(asyncio.Protocol):
    """A worker, from its start to its end.

    Args:
        receive: called with each message.
        lost: called once, with this, when no more messages will come.
    """

    def __init__(self, receive: Callable[[FromWorker], None], lost: Callable[[WorkerProcess], None]) -> None:
        self._receive, self._lost = receive, lost
        self._frames = Frames()
        self._transport: asyncio.WriteTransport | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    async def start(cls, receive: Callable[[FromWorker], None], lost: Callable[[WorkerProcess], None]) -> Self:
        """Start the process. It has not said anything yet."""
        worker = cls(receive, lost)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # A group of its own: a Ctrl-C in the terminal is the parent's to handle, from the first moment.
                worker._process = subprocess.Popen(
                    [sys.executable, "-m", WORKER_MODULE, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    process_group=0,
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,
                    env=worker_environment(),
                )
            except BaseException:
                ours.close()
                raise
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=ours)
        except BaseException:
            ours.close()
            worker.kill()
            raise
        return worker

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        """Send a message; nothing happens if the worker has gone.

        Raises:
            MessageTooLongError: nothing was sent.
        """
        data = frame(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def kill(self) -> None:
        """End the process at once."""
        assert self._process is not None
        self._process.kill()

    async def ended(self, timeout_s: float) -> str:
        """Wait for the end of the process, and kill it if it takes too long.

        Returns:
            How it ended: "signal 9", "exit status 1".
        """
        assert self._process is not None
        try:
            status = await asyncio.to_thread(self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            status = await asyncio.to_thread(self._process.wait)
        finally:
            if self._transport is not None:
                self._transport.abort()
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is watched."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is none by its type

    def data_received(self, data: bytes) -> None:
        """Usually one message: that of a step."""
        try:
            for message in self._frames.feed(data):
                self._receive(from_worker_decoder.decode(message))
        except (MessageTooLongError, msgspec.DecodeError):
            # Not our worker any more. Its end is noticed like any other.
            self.kill()
            raise

    def connection_lost(self, exc: Exception | None) -> None:
        """The process has ended, or is about to."""
        self._transport = None
        self._lost(self)
