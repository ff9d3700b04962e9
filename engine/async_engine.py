"""`AsyncEngine`: the same engine for asyncio, one stream of deltas per request.

A thread of its own drives the core. Requests and aborts go in through one inbox; the outputs of a step go back in one
call into the event loop, not one wake-up per token. A request ends with a final output or an exception, also if the
engine dies.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from engine.builder import BuiltEngine, build_engine
from engine.config import EngineConfig
from engine.errors import EngineDeadError, QuireError, RequestFailedError
from engine.input_processor import Prompt
from engine.outputs import RequestOutput
from engine.requests.request import Request
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.snapshot import snapshot

logger = logging.getLogger("quire.async")
Event = RequestOutput | Exception


@dataclass(frozen=True)
class _Add:
    request: Request


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Call:
    """Something else to do between two steps (reset the prefix cache, say)."""

    function: Any


class _Stop:
    """The thread ends when it reads this."""


class AsyncEngine:
    """An engine behind asyncio. Create it anywhere; call `generate` from one event loop.

    Args:
        model, **settings: as `Engine`.
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        self.config = EngineConfig.from_flat(model=model, **settings)
        self._built: BuiltEngine = build_engine(self.config)
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Call | _Stop] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead: Exception | None = None
        self._thread = threading.Thread(target=self._drive, name="quire-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt, yielding as tokens come. Leaving the iterator early (break, cancellation) aborts the
        request.

        Outputs are deltas unless `sampling_params.output_kind` says otherwise.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: nothing was started.
            RequestFailedError: a step failed. EngineDeadError: the engine cannot go on.
        """
        self._require_alive()
        self._loop = asyncio.get_running_loop()
        params = sampling_params or SamplingParams(output_kind=RequestOutputKind.DELTA)
        request = self._built.inputs.make(prompt, params, request_id=request_id, priority=priority)
        if request.request_id in self._streams:
            raise RequestFailedError(f"request id {request.request_id!r} is in use by a live request.")
        stream: asyncio.Queue[Event] = asyncio.Queue()
        self._streams[request.request_id] = stream
        finished = False
        self._inbox.put(_Add(request))
        try:
            while not finished:
                event = await stream.get()
                if isinstance(event, Exception):
                    finished = True
                    raise event
                finished = event.finished
                if event.error is not None:
                    raise RequestFailedError(event.error)
                yield event
        finally:
            self._streams.pop(request.request_id, None)
            if not finished:
                self._inbox.put(_Abort(request.request_id))

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish reason "abort"."""
        self._inbox.put(_Abort(request_id))

    def describe(self) -> dict[str, Any]:
        """As `Engine.describe`."""
        return self._built.describe()

    def metrics(self) -> dict[str, Any]:
        """As `Engine.metrics`."""
        return snapshot(self._built.core)

    def reset_prefix_cache(self) -> None:
        """As `Engine.reset_prefix_cache`, between two steps."""
        self._inbox.put(_Call(self._built.core.scheduler.reset_prefix_cache))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None with `skip_tokenizer_init`."""
        return self._built.tokenizer

    def shutdown(self) -> None:
        """Stop the thread; live streams get EngineDeadError."""
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    # the engine's thread

    def _require_alive(self) -> None:
        if self._dead is not None or not self._thread.is_alive():
            raise EngineDeadError(f"the engine is not running: {self._dead or 'it was shut down'}.")

    def _drive(self) -> None:
        core = self._built.core
        try:
            while True:
                if not self._take_mail(block=not core.has_work):
                    raise EngineDeadError("the engine was shut down.")
                if core.has_work:
                    self._deliver([(output.request_id, output) for output in core.step()])
        except Exception as error:
            self._dead = (
                error if isinstance(error, EngineDeadError) else EngineDeadError(f"the engine stopped: {error!r}")
            )
            if error is not self._dead:
                logger.exception("the engine's loop failed")
            self._deliver([(request_id, self._dead) for request_id in list(self._streams)])

    def _take_mail(self, *, block: bool) -> bool:
        """Handle what waits in the inbox; with `block`, wait for something. False = stop."""
        while block or not self._inbox.empty():
            message = self._inbox.get()
            block = False
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Abort):
                self._built.core.abort(message.request_id)
            elif isinstance(message, _Call):
                message.function()
            else:
                try:
                    self._built.core.add(message.request)
                except QuireError as error:
                    self._deliver([(message.request.request_id, error)])
        return True

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[tuple[str, Event]]) -> None:
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put_nowait(event)
