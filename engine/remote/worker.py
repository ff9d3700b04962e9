"""`python -m engine.remote.worker FD`: the engine's process. Started by `engine.remote.process`, never by hand.

The main thread builds the engine and drives its core; a second one reads the socket, which costs nothing while nothing
comes. The process ends when it is told to, when the engine cannot go on, or when the socket ends: then its parent has
died, and nobody is left to tell.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn

from engine.builder import build_engine
from engine.built import BuiltEngine
from engine.config import EngineConfig
from engine.driver import Driver, Event
from engine.errors import EngineDeadError, QuireError, RequestFailedError
from engine.remote.deltas import DeltaWriter
from engine.remote.plain import from_plain, to_plain
from engine.remote.wire import (
    Abort,
    Add,
    Answer,
    Ask,
    Failed,
    Frames,
    FromWorker,
    MessageTooLongError,
    Output,
    Ready,
    Refusal,
    Start,
    Step,
    ToWorker,
    error_to_wire,
    frame,
    to_worker_decoder,
)
from engine.requests.request import Request

logger = logging.getLogger("quire.worker")
_READ_BYTES = 2**18


class Sender:
    """The way out. Several threads may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """Send a message; end the process if nobody is there to read it.

        Raises:
            MessageTooLongError: nothing was sent.
        """
        data = frame(message)
        with self._lock:
            try:
                self._connection.sendall(data)
            except OSError:
                end_with_parent()

    def send_step(self, step: Step) -> list[int]:
        """Send the outputs of a step. If they are too long together they go one by one, and one that is too long alone
        (the log-probabilities of a whole vocabulary, say) becomes an error.

        Returns:
            Handles of the requests that got such an error.
        """
        too_long = []
        try:
            self.send(step)
        except MessageTooLongError:
            self.send(Step(step.tokens, [], step.refused))
            for output in step.outputs:
                try:
                    self.send(Step([], [output], []))
                except MessageTooLongError as error:
                    self.send(Step([], [_too_long(output, error)], []))
                    too_long.append(output.handle)
        return too_long


def _too_long(output: Output, error: Exception) -> Output:
    message = f"an output is too long to leave the engine's process: {error}; ask for fewer logprobs."
    return Output(output.handle, [], True, output.num_cached_tokens, None, None, message)


class Service:
    """A built engine and what the other side may ask of it.

    Args:
        built: nobody has driven its core yet.

    Attributes:
        stopping: the other side said so.
    """

    def __init__(self, built: BuiltEngine, sender: Sender) -> None:
        self.driver = Driver(built.core, self._deliver)
        self.stopping = False
        self._sender = sender
        self._writer = DeltaWriter()
        self._answers: dict[str, Callable[..., Any]] = {
            "snapshot": built.snapshot,
            "recent_steps": built.core.timeline.recent_steps,
            "timeline": built.core.timeline.of,
            "reset_prefix_cache": built.core.scheduler.reset_prefix_cache,
        }

    def handle(self, message: ToWorker) -> None:
        """Do what a message says. In the reader's thread."""
        match message:
            case Add(handle, plain):
                request = from_plain(Request, plain)
                self._writer.open(request.request_id, handle)
                self.driver.add(request)
            case Abort(request_id):
                self.driver.abort(request_id)
            case Ask(number, what, arguments):
                answer = self.driver.call(lambda: self._answers[what](*arguments))
                answer.add_done_callback(lambda done: self._answer(number, done))
            case _:
                self.stopping = True
                self.driver.stop()

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        if not events:
            return
        for handle in self._sender.send_step(self._writer.write(events)):
            request_id = self._writer.drop(handle)
            if request_id is not None:
                self.driver.abort(request_id)

    def _answer(self, number: int, done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            self._sender.send(Answer(number, done.result()))
        else:
            wire = error_to_wire(error if isinstance(error, Exception) else RequestFailedError(repr(error)))
            self._sender.send(Refusal(number, wire))


class Reader:
    """The thread that reads the socket. Until there is a service, all that can come is the end."""

    def __init__(self, connection: socket.socket) -> None:
        self.service: Service | None = None
        self._connection = connection
        self._frames = Frames()

    def first(self) -> Start:
        """The message that says what to build."""
        while True:
            for message in self._read():
                assert isinstance(message, Start), "the first message says what to build"
                return message

    def run(self) -> None:
        """Read to the end."""
        while True:
            for message in self._read():
                if self.service is None:
                    end_with_parent()  # told to stop before anything was built
                else:
                    self.service.handle(message)

    def _read(self) -> list[ToWorker]:
        data = self._connection.recv(_READ_BYTES)
        if not data:
            end_with_parent()
        return [to_worker_decoder.decode(message) for message in self._frames.feed(data)]


def end_with_parent() -> NoReturn:
    """End at once, whatever the other threads do: a build may take minutes, and nobody waits for it."""
    os._exit(1)


def main() -> int:
    """Serve one parent.

    Returns:
        The exit status: 0 if the engine was told to stop.
    """
    # A signal to the whole group is the parent's to answer: it stops us when it is ready to.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    reader, sender = Reader(connection), Sender(connection)
    start = reader.first()
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s [engine]: %(message)s",
        force=True,  # a library that was imported may have set up logging of its own
    )
    logging.getLogger("quire").setLevel(start.log_level)
    thread = threading.Thread(target=_run_reader, args=[reader], name="quire-reader", daemon=True)
    thread.start()
    try:
        built = build_engine(EngineConfig.from_flat(**start.settings))
        # What was built lives as long as the process. Looking through it for garbage would stop every stream for as
        # long as several steps take.
        gc.collect()
        gc.freeze()
        reader.service = service = Service(built, sender)
        sender.send(Ready(to_plain(built.info()), None if built.tokenizer_path is None else str(built.tokenizer_path)))
    except Exception as error:
        if not isinstance(error, QuireError):
            logger.exception("the engine could not be built")
            error = EngineDeadError(f"the engine could not be built: {type(error).__name__}: {error}")
        sender.send(Failed(error_to_wire(error)))
        return 1
    dead = service.driver.run()
    if service.stopping:
        return 0
    sender.send(Failed(error_to_wire(dead)))
    return 1


def _run_reader(reader: Reader) -> None:
    try:
        reader.run()
    except Exception:
        logger.exception("a message could not be handled")
        end_with_parent()


if __name__ == "__main__":
    sys.exit(main())
