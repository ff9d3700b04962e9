"""`Driver`: the loop of the thread that owns a core: read the inbox, step, deliver.

`AsyncEngine` runs it in a thread of its own, the engine's process in its main thread; they differ only in where events
go. What comes in are requests, aborts, and calls to be made between two steps, when nobody else touches the core.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from engine.core import EngineCore
from engine.errors import EngineDeadError, QuireError
from engine.outputs import RequestOutput
from engine.requests.request import Request

logger = logging.getLogger("quire.driver")

Event = RequestOutput | Exception
Deliver = Callable[[list[tuple[str, Event]]], None]
"""Takes one step's events, each with the id of its request. Called in the driver's thread; must not raise."""


@dataclass(frozen=True)
class _Add:
    request: Request


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Call:
    function: Callable[[], Any]
    result: Future[Any]


class _Stop:
    """The loop ends when it reads this."""


class Driver:
    """Drives a core. `run` belongs to one thread; everything else may be called from any.

    Args:
        core: nobody else may touch it while `run` runs.
        deliver: takes the events of a step.

    Attributes:
        dead: why the loop ended; None while it runs, or before.
    """

    def __init__(self, core: EngineCore, deliver: Deliver) -> None:
        self.core = core
        self.dead: EngineDeadError | None = None
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Call | _Stop] = queue.SimpleQueue()

    def add(self, request: Request) -> None:
        """Queue a request. Its outputs, or why it was refused, are delivered as events."""
        self._inbox.put(_Add(request))

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens if it is not live."""
        self._inbox.put(_Abort(request_id))

    def call[T](self, function: Callable[[], T]) -> Future[T]:
        """Have a function called between two steps.

        Returns:
            Its result or exception; EngineDeadError if the loop ended before.
        """
        result: Future[T] = Future()
        self._inbox.put(_Call(function, result))
        if self.dead is not None:
            self._refuse_calls()  # nobody else may be left to do it
        return result

    def stop(self) -> None:
        """End the loop after the step that runs now."""
        self._inbox.put(_Stop())

    def run(self) -> EngineDeadError:
        """Serve until `stop`, or until the engine cannot go on.

        Returns:
            Why it ended, as in `dead`. The caller tells whoever still waits for outputs.
        """
        core = self.core
        try:
            while self._take_mail(block=not core.has_work):
                if core.has_work:
                    self._deliver([(output.request_id, output) for output in core.step()])
            dead = EngineDeadError("the engine was shut down.")
        except EngineDeadError as error:
            logger.error("the engine stops: %s", error)
            dead = error
        except Exception as error:
            logger.exception("the engine's loop failed")
            dead = EngineDeadError(f"the engine stopped: {error!r}")
        self.dead = dead
        self._refuse_calls()
        return dead

    def _take_mail(self, *, block: bool) -> bool:
        """Handle what waits in the inbox; with `block`, wait for something. False = stop."""
        while block or not self._inbox.empty():
            message = self._inbox.get()
            block = False
            match message:
                case _Stop():
                    return False
                case _Abort(request_id):
                    self.core.abort(request_id)
                case _Call():
                    _answer(message)
                case _Add(request):
                    try:
                        self.core.add(request)
                    except QuireError as error:
                        self._deliver([(request.request_id, error)])
        return True

    def _refuse_calls(self) -> None:
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Call) and message.result.set_running_or_notify_cancel():
                message.result.set_exception(EngineDeadError(str(self.dead)))


def _answer(call: _Call) -> None:
    if not call.result.set_running_or_notify_cancel():
        return  # whoever asked has gone
    try:
        call.result.set_result(call.function())
    except Exception as error:
        call.result.set_exception(error)
