"""`AsyncEngine`: the same engine for asyncio, one stream of deltas per request.

A thread of its own drives the core. Requests and aborts go in through one inbox; the outputs of a step go back in one
call into the event loop, not one wake-up per token. A request ends with a final output or an exception, also if the
engine dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from engine.builder import BuiltEngine, build_engine
from engine.config import EngineConfig
from engine.errors import EngineDeadError, InvalidRequestError, QuireError, RequestFailedError
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
        self._compiling: dict[str, bool] = {}  # requests that wait for their grammar -> aborted meanwhile
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

        Outputs are deltas unless `sampling_params.output_kind` says otherwise. Without `sampling_params`, as the
        model's `generation_config.json` recommends.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: nothing was started.
            RequestFailedError: a step failed. EngineDeadError: the engine cannot go on.
        """
        self._require_alive()
        self._enter_loop()
        if priority != 0 and self.config.scheduler.scheduling_policy != "priority":
            raise InvalidRequestError("priority needs scheduling_policy='priority'.", "priority")
        params = sampling_params
        if params is None:
            params = self._built.default_sampling.replace(output_kind=RequestOutputKind.DELTA)
        request = self._built.inputs.make(prompt, params, request_id=request_id, priority=priority)
        aborted = await self._compile_grammar(request)
        stream = self._open(request)
        if aborted:
            self._inbox.put(_Abort(request.request_id))
        finished = False
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
            if not finished:
                self._inbox.put(_Abort(request.request_id))

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish reason "abort"."""
        if request_id in self._compiling:
            self._compiling[request_id] = True
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

    # the event loop

    def _enter_loop(self) -> None:
        """Note where outputs go. Streams of a loop that was closed are lost, and with them their ids are free."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("AsyncEngine.generate must be called from one event loop; another one is in use.")
            self._streams.clear()
            self._loop = loop

    async def _compile_grammar(self, request: Request) -> bool:
        """Wait for the grammar of a request, if it has one: neither this loop nor the engine's waits with it.

        Returns:
            True if the request was aborted meanwhile.

        Raises:
            InvalidRequestError: the grammar is at fault.
        """
        params, grammars = request.params.structured_outputs, self._built.core.grammars
        if params is None or grammars is None:
            return False
        self._compiling[request.request_id] = False
        try:
            # Shielded: others may wait for the same grammar.
            await asyncio.shield(asyncio.wrap_future(grammars.submit(params)))
        finally:
            aborted = self._compiling.pop(request.request_id, False)
        return aborted

    def _open(self, request: Request) -> asyncio.Queue[Event]:
        """Send a request to the engine. Its id is in use until its last event comes, also if nobody waits for that."""
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a live request.", "request_id")
        stream: asyncio.Queue[Event] = asyncio.Queue()
        self._streams[request_id] = stream
        self._inbox.put(_Add(request))
        if self._dead is not None:  # it died meanwhile, perhaps without having seen this stream
            del self._streams[request_id]
            self._require_alive()
        return stream

    def _dispatch(self, events: list[tuple[str, Event]]) -> None:
        for request_id, event in events:
            last = isinstance(event, Exception) or event.finished
            stream = self._streams.pop(request_id, None) if last else self._streams.get(request_id)
            if stream is not None:
                stream.put_nowait(event)

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
            self._deliver([(request_id, EngineDeadError(str(self._dead))) for request_id in list(self._streams)])

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
        if events and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._dispatch, events)
