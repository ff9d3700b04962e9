"""`Exchange`: who on this side waits for what from the engine's process. No jax."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from engine.errors import EngineDeadError, InvalidRequestError
from engine.remote.deltas import LiveRequest
from engine.remote.wire import Answer, FromWorker, Refusal, Step, error_from_wire
from engine.requests.request import Request
from engine.sampling_params import RequestOutputKind
from engine.stream import OutputStream


class Exchange:
    """Live requests by their handle, open questions by their number. Both count on over new processes, so that a late
    answer of an old one finds nobody.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._live: dict[int, LiveRequest] = {}
        self._ids: set[str] = set()
        self._asked: dict[int, asyncio.Future[Any]] = {}

    def require_free(self, request_id: str) -> None:
        """An id is in use until its last output comes, also if nobody waits for that.

        Raises:
            InvalidRequestError: it is in use.
        """
        if request_id in self._ids:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a live request.", "request_id")

    def next_number(self) -> int:
        """A handle or a number that was not used before."""
        return next(self._numbers)

    def open(self, handle: int, request: Request) -> OutputStream:
        """A request was sent under this handle."""
        stream = OutputStream(cumulative=request.params.output_kind is RequestOutputKind.CUMULATIVE)
        self._ids.add(request.request_id)
        self._live[handle] = LiveRequest(request, stream)
        return stream

    async def answer(self, number: int) -> Any:
        """Wait for the answer to a question that was sent under this number.

        Raises:
            QuireError: the other side refused.
            EngineDeadError: there is no other side any more.
        """
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            return await future
        finally:
            self._asked.pop(number, None)

    def receive(self, message: FromWorker) -> None:
        """A message of the engine's process."""
        match message:
            case Step():
                self._receive_step(message)
            case Answer(number, value):
                if (future := self._asked.get(number)) is not None and not future.done():
                    future.set_result(value)
            case Refusal(number, error):
                if (future := self._asked.get(number)) is not None and not future.done():
                    future.set_exception(error_from_wire(error))

    def end_all(self, why: EngineDeadError) -> None:
        """The process is gone. Each stream gets an exception of its own: it carries the traceback of whoever got it."""
        for handle in list(self._live):
            self._end(handle).stream.fail(EngineDeadError(str(why)))
        for future in self._asked.values():
            if not future.done():
                future.set_exception(type(why)(str(why)))

    def _receive_step(self, step: Step) -> None:
        live = self._live
        for handle, token_ids, text in step.tokens:
            live[handle].put_tokens(token_ids, text)
        for output in step.outputs:
            (self._end(output.handle) if output.finished else live[output.handle]).put(output)
        for handle, error in step.refused:
            self._end(handle).stream.fail(error_from_wire(error))

    def _end(self, handle: int) -> LiveRequest:
        live = self._live.pop(handle)
        self._ids.discard(live.request.request_id)
        return live
