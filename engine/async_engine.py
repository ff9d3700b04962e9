"""`AsyncEngine`: the same engine for asyncio, one stream of deltas per request. An `EngineClient`.

A thread of its own drives the core (`engine/driver.py`). The outputs of a step go back in one call into the event loop,
not one wake-up per token. A request ends with a final output or an exception, also if the engine dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

from engine.builder import build_engine
from engine.built import BuiltEngine
from engine.client import EngineInfo, RequestTimeline, StepEvent
from engine.config import EngineConfig
from engine.driver import Driver, Event
from engine.errors import EngineDeadError, InvalidRequestError
from engine.input_processor import Prompt
from engine.outputs import EmbeddingOutput, RequestOutput
from engine.pooling import Pooling, PoolingParams
from engine.requests.request import Request
from engine.sampling_params import RequestOutputKind, SamplingParams
from engine.stream import OutputStream, as_deltas, make_request
from engine.text.tokenizer import Tokenizer


class AsyncEngine:
    """An engine behind asyncio. Create it anywhere; call `generate` from one event loop.

    Args:
        model, **settings: as `Engine`.
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        self.config = EngineConfig.from_flat(model=model, **settings)
        self._built: BuiltEngine = build_engine(self.config)
        self._info = self._built.info()
        self._driver = Driver(self._built.core, self._deliver)
        self._streams: dict[str, OutputStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._drive, name="quire-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """What never changes."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None with `skip_tokenizer_init`."""
        return self._built.tokenizer

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt, yielding as tokens come. Leaving the iterator early (break, cancellation) aborts the
        request. A consumer that is slower than the engine gets merged deltas.

        Outputs are deltas unless `sampling_params.output_kind` says otherwise. Without `sampling_params`, as the
        model's `generation_config.json` recommends.

        Raises:
            InvalidRequestError, ContextLengthError, QueueFullError: nothing was started.
            RequestFailedError: a step failed. EngineDeadError: the engine cannot go on.
        """
        self._require_alive()
        self._enter_loop()
        request = make_request(
            self._info, self._built.inputs, prompt, sampling_params, request_id=request_id, priority=priority
        )
        stream = self._open(request)
        try:
            while not stream.ended:
                yield await stream.get()
        finally:
            if not stream.ended:
                self._driver.abort(request.request_id)

    async def embed(
        self, prompt: Prompt, *, pooling: Pooling = "last", normalize: bool = True, request_id: str | None = None
    ) -> EmbeddingOutput:
        """The pooled hidden states of a prompt, after the final norm. Cancellation aborts the request.

        Raises:
            As `generate`; RequestFailedError also if the request was aborted.
        """
        self._require_alive()
        self._enter_loop()
        request = self._built.inputs.make_pooled(prompt, PoolingParams(pooling, normalize), request_id=request_id)
        stream = self._open(request)
        try:
            output = await stream.get()  # there is one: it comes when the prompt is computed
        except asyncio.CancelledError:
            self.abort(request.request_id)
            raise
        return EmbeddingOutput.of(output)

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish reason "abort"."""
        self._driver.abort(request_id)

    async def snapshot(self) -> dict[str, Any]:
        """As `Engine.metrics`, of a moment between two steps.

        Raises:
            EngineDeadError: the engine is not running.
        """
        return await asyncio.wrap_future(self._driver.call(self._built.snapshot))

    async def recent_steps(self, since: int) -> list[StepEvent]:
        """The engine's steps with `step_id >= since`, of the newest 1024.

        Raises:
            EngineDeadError: the engine is not running.
        """
        timeline = self._built.core.timeline
        return await asyncio.wrap_future(self._driver.call(lambda: timeline.recent_steps(since)))

    async def timeline(self, request_id: str) -> RequestTimeline | None:
        """What happened to a request; None if it is not known (any more).

        Raises:
            EngineDeadError: the engine is not running.
        """
        timeline = self._built.core.timeline
        return await asyncio.wrap_future(self._driver.call(lambda: timeline.of(request_id)))

    async def check_health(self) -> None:
        """Return if the engine runs.

        Raises:
            EngineDeadError: it does not.
        """
        self._require_alive()

    async def reset_prefix_cache(self) -> None:
        """As `Engine.reset_prefix_cache`, between two steps.

        Raises:
            EngineDeadError: the engine is not running.
        """
        await asyncio.wrap_future(self._driver.call(self._built.core.scheduler.reset_prefix_cache))

    def describe(self) -> dict[str, Any]:
        """As `Engine.describe`."""
        return self._built.describe()

    def metrics(self) -> dict[str, Any]:
        """As `Engine.metrics`, at once: it may be of the middle of a step."""
        return self._built.snapshot()

    def shutdown(self) -> None:
        """Stop the thread; live streams get EngineDeadError."""
        if self._thread.is_alive():
            self._driver.stop()
            self._thread.join()
        self._built.close()

    async def close(self) -> None:
        """`shutdown`, without blocking the event loop."""
        await asyncio.to_thread(self.shutdown)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # the event loop

    def _enter_loop(self) -> None:
        """Note where outputs go. Streams of a loop that was closed are lost, and with them their ids are free."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("AsyncEngine.generate must be called from one event loop; another one is in use.")
            self._streams.clear()
            self._loop = loop

    def _open(self, request: Request) -> OutputStream:
        """Send a request to the engine. Its id is in use until its last event comes, also if nobody waits for that."""
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a live request.", "request_id")
        stream = OutputStream(cumulative=request.params.output_kind is RequestOutputKind.CUMULATIVE)
        self._streams[request_id] = stream
        self._driver.add(as_deltas(request))
        if self._driver.dead is not None:  # it died meanwhile, perhaps without having seen this stream
            del self._streams[request_id]
            self._require_alive()
        return stream

    def _dispatch(self, events: list[tuple[str, Event]]) -> None:
        for request_id, event in events:
            if isinstance(event, Exception):
                stream = self._streams.pop(request_id, None)
                if stream is not None:
                    stream.fail(event)
            else:
                stream = self._streams.pop(request_id, None) if event.finished else self._streams.get(request_id)
                if stream is not None:
                    stream.put(event)

    def _end_all(self, dead: EngineDeadError) -> None:
        """Every stream gets an exception of its own: it carries the traceback of the one who got it."""
        while self._streams:
            self._streams.popitem()[1].fail(EngineDeadError(str(dead)))

    def _require_alive(self) -> None:
        if self._driver.dead is not None:
            raise EngineDeadError(f"the engine is not running: {self._driver.dead}")

    # the engine's thread

    def _drive(self) -> None:
        self._in_loop(self._end_all, self._driver.run())

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        if events:
            self._in_loop(self._dispatch, events)

    def _in_loop(self, function: Any, argument: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(function, argument)
